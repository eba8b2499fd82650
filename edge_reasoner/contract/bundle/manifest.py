"""The bundle's manifest and golden vectors: the vocabulary shared by the export stage and the device.

Both are untrusted input when read. Parsing is strict: unknown fields, wrong types, missing fields and
out-of-range numbers are refused by `msgspec`; what types cannot say is checked in `Manifest.validate`.

`manifest.json` is canonical JSON (sorted keys, no spaces, UTF-8, one trailing newline) and carries a digest
of itself: `bundle_id` is the SHA-256 of the canonical manifest whose `bundle_id` is the empty string. The
manifest lists every other file with its size and SHA-256, so one flipped byte anywhere is found.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from edge_reasoner.contract.bundle.old_schemas import other_schema
from edge_reasoner.errors import BundleError

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
#: A manifest larger than this is refused before it is parsed.
MAX_MANIFEST_BYTES = 4 * 1024 * 1024
MAX_GOLDEN_BYTES = 16 * 1024 * 1024
MAX_FILES = 4096
MAX_LAYERS = 1024
#: of one component, each of which may be tried several times on a device; the exporter writes two or three
MAX_VARIANTS = 16

# \Z: `$` would let one line feed pass at the end
Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**53)]
PositiveCount = Annotated[int, Meta(ge=1, le=2**53)]
Name = Annotated[str, Meta(min_length=1, max_length=200)]
#: one plain word: what a file, a command or a table may be named by
Word = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")]
BoardName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,63}\Z")]
Version = Annotated[str, Meta(pattern=r"^[0-9]{1,6}(\.[0-9]{1,6}){0,3}\Z")]
FilePath = Annotated[str, Meta(min_length=1, max_length=400)]
Setting = Annotated[str, Meta(max_length=200)]
Magnitude = Annotated[float, Meta(ge=0, le=1e15)]
PerLayer = Annotated[tuple[PositiveCount, ...], Meta(max_length=MAX_LAYERS)]
TokenIds = Annotated[tuple[Count, ...], Meta(max_length=1024)]

ComponentKind = Literal["reasoner", "preprocessor", "draft", "gate"]
Json = Any
T = TypeVar("T", bound=msgspec.Struct)


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Immutable, keyword-only, refuses unknown fields."""


class FileEntry(_Record, frozen=True, kw_only=True):
    """One file of the bundle; `path` is relative to the bundle, with forward slashes."""

    path: FilePath
    size_bytes: Count
    sha256: Sha256


class Variant(_Record, frozen=True, kw_only=True):
    """One way to run a component: a graph with a backend, an execution provider and session options.

    Variants are listed fastest first as the exporter expects it; the activation self-test decides on the
    device. `reference` marks the slow full-precision-arithmetic configuration of last resort.
    """

    id: Word
    #: a name from the table in `edge_reasoner.backends`
    backend: Word
    execution_provider: Word
    graph: FilePath
    session_options: Annotated[dict[Word, Setting], Meta(max_length=16)] = {}
    isa_floor: Annotated[tuple[Word, ...], Meta(max_length=64)] = ()
    minimum_runtime: Version
    ram_floor_bytes: Count
    reference: bool = False


class DecoderSpec(_Record, frozen=True, kw_only=True, tag="decoder", tag_field="type"):
    """What the device needs to know of a causal LM's graph.

    Graph inputs: `input_ids` int64 [batch, tokens]; `seqlens_k` int32 [batch] (tokens in the cache after this
    step, minus one); `total_sequence_length` int32 []; `logits_to_keep` int64 [1] (how many last positions
    get logits); `states_to_keep` int64 [1] (how many last positions get through the final norm, at least
    those); `past_key_values.{i}.key|value` [batch, kv_heads[i], context, head_dim[i]]. Outputs: `logits`
    float32 [batch, logits_to_keep, vocab]; `hidden_last` float32 [batch, hidden_size], the final norm's
    output at the last position; `hidden_sum`, the same summed over the last `states_to_keep` positions;
    `present.{i}.key|value`, to be bound to the same buffers as past.
    """

    family: Name
    vocab_size: PositiveCount
    hidden_size: PositiveCount
    kv_heads: PerLayer
    head_dim: PerLayer
    kv_dtype: Literal["float32", "float16"]
    context_tokens: PositiveCount
    parameters: PositiveCount
    #: tokens that end an answer
    eos_token_ids: TokenIds
    #: prepended to every raw prompt, or None where the family has none
    bos_token_id: Count | None

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token adds to the KV cache, all layers together."""
        width = {"float32": 4, "float16": 2}[self.kv_dtype]
        return sum(2 * h * d * width for h, d in zip(self.kv_heads, self.head_dim, strict=True))


class EncoderSpec(_Record, frozen=True, kw_only=True, tag="encoder", tag_field="type"):
    """What the device needs to know of a BERT-family encoder's graph.

    Inputs: `input_ids`, `attention_mask`, `token_type_ids`, int64 [batch, tokens]. Output: `embedding`
    float32 [batch, dimension], mean- or CLS-pooled and L2-normalized inside the graph.
    """

    family: Name
    vocab_size: PositiveCount
    dimension: PositiveCount
    context_tokens: PositiveCount
    parameters: PositiveCount
    pooling: Literal["mean", "cls"]


class Source(_Record, frozen=True, kw_only=True):
    """Where a component's weights came from."""

    name: Name
    format: Literal["safetensors", "gguf"]
    sha256: Sha256
    size_bytes: Count
    calibration_sha256: Sha256 | None = None


class Predicted(_Record, frozen=True, kw_only=True):
    """The cost model's figures of a component on the bundle's board (estimates: never a measurement).

    An encoder decodes nothing: its `decode_tps` is None, and `ttft_ms` is the time of one text.
    """

    prefill_tps: Magnitude
    decode_tps: Magnitude | None = None
    ttft_ms: Magnitude
    peak_rss_mb: Magnitude
    joules_per_token: Magnitude | None = None


class Component(_Record, frozen=True, kw_only=True):
    """One part of a bundle, with all that is known of it; replaced as a whole, without its neighbours."""

    kind: ComponentKind
    #: what people call the model
    name: Name
    version: PositiveCount
    licence: Name
    source: Source
    #: name -> version of what took part in making it
    tools: Annotated[dict[Name, Setting], Meta(max_length=64)]
    #: the exporter's plan, as printed by --dry-run: every per-layer decision
    plan: dict[Name, Json]
    spec: DecoderSpec | EncoderSpec
    variants: Annotated[tuple[Variant, ...], Meta(min_length=1, max_length=MAX_VARIANTS)]
    #: path of the golden vectors, `golden/<kind>.json`
    golden: FilePath
    #: folder with `tokenizer.json` and, for a decoder, perhaps `chat_template.jinja`
    tokenizer: FilePath
    files: tuple[FileEntry, ...]
    #: measured at export, e.g. top1_agreement, perplexity_ratio, mean_cosine, with *_stderr beside them
    quality: Annotated[dict[Name, float], Meta(max_length=64)] = {}
    predicted: Predicted | None = None


class Manifest(_Record, frozen=True, kw_only=True):
    """The whole manifest: what board the bundle is for, its components, and what belongs to none of them."""

    schema_version: Literal[2]
    bundle_id: Sha256
    version: PositiveCount
    profile: BoardName
    profile_sha256: Sha256
    components: Annotated[tuple[Component, ...], Meta(min_length=1, max_length=16)]
    #: files of the bundle as a whole: `report.html`
    files: tuple[FileEntry, ...] = ()

    @property
    def entries(self) -> tuple[FileEntry, ...]:
        """Every listed file: the components' in their order, then the bundle's own."""
        return (*(entry for part in self.components for entry in part.files), *self.files)

    @property
    def model(self) -> str:
        """What people call the bundle's model: its reasoner's name, or the first component's."""
        named = self.component("reasoner") or next(iter(self.components), None)
        return "" if named is None else named.name

    def component(self, kind: ComponentKind) -> Component | None:
        """The component of that kind, or None."""
        return next((c for c in self.components if c.kind == kind), None)

    def validate(self) -> Manifest:
        """Checks what types cannot say. Raises BundleError."""
        if self.bundle_id != bundle_id(self):
            raise BundleError(f"{MANIFEST_NAME}: its content does not match its own digest (bundle_id)")
        kinds = [c.kind for c in self.components]
        if len(set(kinds)) != len(kinds):
            raise BundleError(f"{MANIFEST_NAME}: components: a kind appears twice: {', '.join(kinds)}")
        seen: set[str] = set()
        for component in self.components:
            where = f"{MANIFEST_NAME}: component {component.kind!r}"
            _check_files(component.files, seen, where)
            _check_component(component, where)
        _check_files(self.files, seen, MANIFEST_NAME)
        if len(seen) > MAX_FILES:
            raise BundleError(f"{MANIFEST_NAME}: {len(seen)} files; at most {MAX_FILES} are allowed")
        return self


def _check_files(files: tuple[FileEntry, ...], seen: set[str], where: str) -> None:
    """Plain paths, none twice in the whole bundle; adds them to `seen`."""
    for entry in files:
        check_relative_path(entry.path, where)
        if entry.path in seen or entry.path == MANIFEST_NAME:
            raise BundleError(f"{where}: file {entry.path!r} is listed twice")
        seen.add(entry.path)


def _check_component(component: Component, where: str) -> None:
    paths = {entry.path for entry in component.files}
    named = [("golden", component.golden), *(("graph", variant.graph) for variant in component.variants)]
    for field, path in named:
        if path not in paths:
            raise BundleError(f"{where}: {field} {path!r} is not among its files")
    check_relative_path(component.tokenizer, f"{where}: tokenizer")
    ids = [variant.id for variant in component.variants]
    if len(set(ids)) != len(ids):
        raise BundleError(f"{where}: variants: an id appears twice: {', '.join(ids)}")
    spec = component.spec
    if isinstance(spec, DecoderSpec) and len(spec.kv_heads) != len(spec.head_dim):
        raise BundleError(f"{where}: spec: kv_heads and head_dim differ in length")


class GoldenCheck(_Record, frozen=True, kw_only=True):
    """Expected logits at one position, for a chosen set of token ids (the top ones and some others)."""

    position: Count
    argmax: Count
    token_ids: tuple[Count, ...]
    logits: tuple[float, ...]


class DecoderGolden(_Record, frozen=True, kw_only=True):
    """Feed `token_ids[:prefill_tokens]` in one call, then the rest one by one; compare after each call."""

    token_ids: tuple[Count, ...]
    prefill_tokens: PositiveCount
    checks: tuple[GoldenCheck, ...]


class EncoderGolden(_Record, frozen=True, kw_only=True):
    """One input and its embedding."""

    token_ids: tuple[Count, ...]
    embedding: tuple[float, ...]


class GoldenSet(_Record, frozen=True, kw_only=True):
    """Golden vectors of one component and how closely a kernel must reproduce them.

    For a decoder, `tolerance` bounds the relative RMS error of each check: ‖got − expected‖ / ‖expected −
    mean(expected)‖ over its `token_ids`; for an encoder it bounds 1 − cosine. Expected values come from the
    torch model on the *dequantized* weights, so the tolerance covers arithmetic, not quantization.
    """

    schema_version: Literal[1]
    tolerance: float
    decoder: tuple[DecoderGolden, ...] = ()
    encoder: tuple[EncoderGolden, ...] = ()


def check_relative_path(path: str, where: str) -> None:
    """Raises BundleError unless `path` is a plain relative POSIX path that stays inside the bundle."""
    parts = PurePosixPath(path).parts
    if (
        not re.fullmatch(r"[A-Za-z0-9._/+-]+", path)
        or path.startswith("/")
        or not parts
        or any(part in ("..", ".") for part in parts)
        or str(PurePosixPath(path)) != path
    ):
        raise BundleError(f"{where}: path {path!r} must be relative, inside the bundle, of A-Za-z0-9._+-/")


def to_canonical_json(record: msgspec.Struct) -> bytes:
    """Canonical bytes of a record: sorted keys, no spaces, UTF-8, one trailing newline."""
    return msgspec.json.encode(record, order="sorted") + b"\n"


def bundle_id(manifest: Manifest) -> str:
    """SHA-256 (hex) of the canonical manifest with an empty `bundle_id`."""
    blank = msgspec.structs.replace(manifest, bundle_id="")
    return hashlib.sha256(to_canonical_json(blank)).hexdigest()


def seal(manifest: Manifest) -> Manifest:
    """The same manifest with its `bundle_id` set, validated."""
    return msgspec.structs.replace(manifest, bundle_id=bundle_id(manifest)).validate()


def parse_manifest(data: bytes) -> Manifest:
    """Strictly parses and validates canonical manifest bytes. Raises BundleError with the offending field."""
    if len(data) > MAX_MANIFEST_BYTES:
        raise BundleError(f"{MANIFEST_NAME}: {len(data)} bytes; at most {MAX_MANIFEST_BYTES} are allowed")
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(other_schema(data, SCHEMA_VERSION) or f"{MANIFEST_NAME}: {error}") from error
    if to_canonical_json(manifest) != data:
        raise BundleError(f"{MANIFEST_NAME}: not canonical JSON (its bytes were changed after export)")
    return manifest.validate()


def parse_strictly(data: bytes, kind: type[T], where: str, limit_bytes: int) -> T:
    """One record from JSON of at most `limit_bytes`. Raises BundleError naming `where` and the field."""
    if len(data) > limit_bytes:
        raise BundleError(f"{where}: {len(data)} bytes; at most {limit_bytes} are allowed")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BundleError(f"{where}: {error}") from error


def parse_golden(data: bytes, where: str) -> GoldenSet:
    """Strictly parses golden vectors. Raises BundleError."""
    golden = parse_strictly(data, GoldenSet, where, MAX_GOLDEN_BYTES)
    for vector in golden.decoder:
        if vector.prefill_tokens > len(vector.token_ids):
            raise BundleError(f"{where}: prefill_tokens exceeds the length of token_ids")
        for check in vector.checks:
            if len(check.token_ids) != len(check.logits) or not check.logits:
                raise BundleError(f"{where}: a check's token_ids and logits differ in length")
    return golden
