"""Every field of a bundle's JSON files, damaged one at a time: one line that names the field.

The schemas are walked, not listed: a new field without an entry in `ILLEGAL` fails here.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from support import tiny_graphs as tiny
from support.tiny_bundle import TOKENS, decoder_golden, encoder_golden, reseal, write_bundle

from edge_reasoner.backends.golden import check_golden
from edge_reasoner.contract.bundle.manifest import GoldenSet, Manifest, parse_golden, to_canonical_json
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.contract.bundle.tokenizer_files import TokenizerConfig, parse_tokenizer_config
from edge_reasoner.errors import BundleError

LONG = "x" * 401
NO_SHA256 = ["", "0" * 63, "0" * 65, "G" * 64, "A" * 64, "0" * 64 + "\n"]
NO_COUNT = [-1, 2**53 + 1, 2**64, -(2**64)]
NO_POSITIVE = [0, *NO_COUNT]
NO_NAME = ["", LONG]
NO_WORD = ["", LONG, "../x", "/x", "a b", "a\n", "-x", "\u202egnp"]
NO_PATH = ["", LONG, "../x", "/etc/passwd", "a//b", "a\\b", "./a", "a\x00b", "unlisted"]
NO_MAGNITUDE = [-1.0, -1e-9, 1e16, 1e300]
NO_SETTINGS = [{"": "x"}, {"../x": "1"}, {"x": LONG}, {f"k{i}": "1" for i in range(65)}]

#: (struct, field) -> values of the right type that no bundle may hold; () where every value is legal
ILLEGAL: dict[tuple[str, str], Any] = {
    ("Manifest", "schema_version"): [0, 1, 3, -1, 2**62],
    ("Manifest", "bundle_id"): NO_SHA256,
    ("Manifest", "version"): NO_POSITIVE,
    ("Manifest", "profile"): [*NO_WORD, "Board", "board_1"],
    ("Manifest", "profile_sha256"): NO_SHA256,
    ("Manifest", "components"): [[]],
    ("Manifest", "files"): [[{"path": "r.html", "size_bytes": 1, "sha256": "0" * 64}] * 2],
    ("FileEntry", "path"): NO_PATH,
    ("FileEntry", "size_bytes"): [*NO_COUNT, 0, 2**53],
    ("FileEntry", "sha256"): [*NO_SHA256, "0" * 64],
    ("Component", "kind"): ["", "rootkit", "preprocessor"],
    ("Component", "name"): NO_NAME,
    ("Component", "version"): NO_POSITIVE,
    ("Component", "licence"): NO_NAME,
    ("Component", "source"): (),
    ("Component", "tools"): [{"": "1"}, {"x": LONG}, {f"t{i}": "1" for i in range(65)}],
    ("Component", "plan"): [{"": 1}, {LONG: 1}],
    ("Component", "spec"): [{}, {"type": "diffusion"}],
    ("Component", "variants"): [[]],
    ("Component", "golden"): NO_PATH,
    ("Component", "tokenizer"): NO_PATH,
    ("Component", "files"): [[]],
    ("Component", "quality"): [{"": 1.0}, {f"q{i}": 1.0 for i in range(65)}],
    ("Component", "predicted"): (),
    ("Source", "name"): NO_NAME,
    ("Source", "format"): ["", "pickle"],
    ("Source", "sha256"): NO_SHA256,
    ("Source", "size_bytes"): NO_COUNT,
    ("Source", "calibration_sha256"): NO_SHA256,
    ("Predicted", "prefill_tps"): NO_MAGNITUDE,
    ("Predicted", "decode_tps"): NO_MAGNITUDE,
    ("Predicted", "ttft_ms"): NO_MAGNITUDE,
    ("Predicted", "peak_rss_mb"): NO_MAGNITUDE,
    ("Predicted", "joules_per_token"): NO_MAGNITUDE,
    ("Variant", "id"): [*NO_WORD, "fp32"],
    ("Variant", "backend"): NO_WORD,
    ("Variant", "execution_provider"): NO_WORD,
    ("Variant", "graph"): [*NO_PATH, "graphs/int4.onnx.data", "golden/reasoner.json"],
    ("Variant", "session_options"): NO_SETTINGS,
    ("Variant", "isa_floor"): [[""], ["a b"], ["../x"], ["x"] * 65],
    ("Variant", "minimum_runtime"): ["", "1.", ".1", "1.2.3.4.5", "x", "1.2rc1", "9" * 7, "1.2\n", "-1"],
    ("Variant", "ram_floor_bytes"): NO_COUNT,
    ("Variant", "reference"): (),
    ("DecoderSpec", "family"): NO_NAME,
    ("DecoderSpec", "vocab_size"): [*NO_POSITIVE, 2**53],
    ("DecoderSpec", "hidden_size"): [*NO_POSITIVE, 2**53],
    ("DecoderSpec", "kv_heads"): [[], [1], [0, 1], [-1, 1], [2**53, 1], [1] * 2000],
    ("DecoderSpec", "head_dim"): [[], [16], [0, 16], [-1, 16], [2**53, 16], [16] * 2000],
    ("DecoderSpec", "kv_dtype"): ["", "float64", "int8"],
    ("DecoderSpec", "context_tokens"): [*NO_POSITIVE, 2**53],
    ("DecoderSpec", "parameters"): [*NO_POSITIVE, 2**53],
    ("DecoderSpec", "eos_token_ids"): [[-1], [tiny.VOCAB], [2**64], [1] * 1025],
    ("DecoderSpec", "bos_token_id"): [-1, tiny.VOCAB, 2**64],
    ("EncoderSpec", "family"): NO_NAME,
    ("EncoderSpec", "vocab_size"): [*NO_POSITIVE, 2**53],
    ("EncoderSpec", "dimension"): [*NO_POSITIVE, 2**53],
    ("EncoderSpec", "context_tokens"): [*NO_POSITIVE, 2**53],
    ("EncoderSpec", "parameters"): [*NO_POSITIVE, 2**53],
    ("EncoderSpec", "pooling"): ["", "max"],
    ("GoldenSet", "schema_version"): [0, 2, -1],
    ("GoldenSet", "tolerance"): [0.0, -0.1, 1.1, 1e300],
    ("GoldenSet", "decoder"): [[]],
    ("GoldenSet", "encoder"): [[{"token_ids": [1], "embedding": [1.0]}]],
    ("DecoderGolden", "token_ids"): [[], [-1], [tiny.VOCAB], [2**64], [1] * 5000],
    ("DecoderGolden", "prefill_tokens"): [*NO_POSITIVE, len(TOKENS) + 1],
    ("DecoderGolden", "checks"): [[]],
    ("GoldenCheck", "position"): [*NO_COUNT, len(TOKENS)],
    ("GoldenCheck", "argmax"): [*NO_COUNT, tiny.VOCAB],
    ("GoldenCheck", "token_ids"): [[], [1], [-1] * 48, [tiny.VOCAB] * 48],
    ("GoldenCheck", "logits"): [[], [1.0]],
    ("EncoderGolden", "token_ids"): [[], [-1], [tiny.VOCAB], [1] * 5000],
    ("EncoderGolden", "embedding"): [[], [1.0]],
    ("TokenizerConfig", "add_bos"): (),
    ("TokenizerConfig", "bos_token"): ["", LONG],
    ("TokenizerConfig", "eos_token"): ["", LONG],
    ("TokenizerConfig", "unk_token"): ["", LONG],
    ("TokenizerConfig", "pad_token"): ["", LONG],
}  # fmt: skip
#: struct -> where one of them stands in its document
PLACES: dict[str, tuple[str | int, ...]] = {
    "Manifest": (),
    "FileEntry": ("components", 0, "files", 0),
    "Component": ("components", 0),
    "Source": ("components", 0, "source"),
    "Predicted": ("components", 0, "predicted"),
    "Variant": ("components", 0, "variants", 0),
    "DecoderSpec": ("components", 0, "spec"),
    "EncoderSpec": ("components", 1, "spec"),
    "GoldenSet": (),
    "DecoderGolden": ("decoder", 0),
    "GoldenCheck": ("decoder", 0, "checks", 0),
    "EncoderGolden": ("encoder", 0),
    "TokenizerConfig": (),
}
#: what a message calls a field instead of by its name
ALIASES = {
    ("FileEntry", "path"): ("path", "not listed", "missing", "not among its files"),
    ("FileEntry", "size_bytes"): ("size_bytes", "bytes, the manifest says"),
    ("FileEntry", "sha256"): ("sha256", "SHA-256"),
    ("Component", "kind"): ("kind", "a kind appears twice"),
    ("Manifest", "files"): ("files", "'r.html' is listed twice"),
}
ONE_OF_EACH: list[Any] = [None, True, 7, 1.5, "text", [{}], {"x": []}]


def structs(root: type) -> Iterator[msgspec.inspect.StructType]:
    """Every struct that a document of that schema may hold."""
    seen: set[type] = set()

    def walk(kind: Any) -> Iterator[msgspec.inspect.StructType]:
        if isinstance(kind, msgspec.inspect.StructType) and kind.cls not in seen:
            seen.add(kind.cls)
            yield kind
            for field in kind.fields:
                yield from walk(field.type)
        for part in ("types", "item_types"):
            for inner in getattr(kind, part, ()):
                yield from walk(inner)
        for part in ("type", "item_type", "value_type"):
            if isinstance(inner := getattr(kind, part, None), msgspec.inspect.Type):
                yield from walk(inner)

    yield from walk(msgspec.inspect.type_info(root))


ROOTS = (Manifest, GoldenSet, TokenizerConfig)
FIELDS = {
    (struct.cls.__name__, field.name): field
    for root in ROOTS
    for struct in structs(root)
    for field in struct.fields
}
ROOT_OF = {struct.cls.__name__: root for root in ROOTS for struct in structs(root)}


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of that type, whatever its bounds."""
    info = msgspec.inspect
    if isinstance(kind, info.DictType) and isinstance(kind.value_type, info.AnyType):
        return isinstance(value, dict)
    if isinstance(kind, info.UnionType):
        return any(fits(value, inner) for inner in kind.types)
    kinds: list[tuple[type, tuple[type, ...]]] = [
        (info.NoneType, (type(None),)), (info.BoolType, (bool,)), (info.IntType, (int,)),
        (info.FloatType, (int, float)), (info.StrType, (str,)), (info.LiteralType, (str, int)),
        (info.VarTupleType, ()), (info.DictType, ()), (info.StructType, ()),
    ]  # fmt: skip
    accepted = next(plain for tested, plain in kinds if isinstance(kind, tested))
    return type(value) in accepted


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A bundle that opens and says something in every field."""
    logits = np.random.default_rng(0).normal(size=(len(TOKENS), tiny.VOCAB)).astype(np.float32)
    root = write_bundle(tmp_path_factory.mktemp("sound") / "bundle", decoder_golden(logits, 0.1))

    def fill(plain: dict[str, Any]) -> None:
        part = plain["components"][0]
        part["predicted"] = {"prefill_tps": 9.5, "decode_tps": 3.5, "ttft_ms": 1.5, "peak_rss_mb": 2.5,
                             "joules_per_token": None}  # fmt: skip
        part["quality"] = {"top1_agreement": 0.5}
        part["source"]["calibration_sha256"] = "1" * 64

    reseal(root, fill)
    open_bundle(root)
    return root


@pytest.fixture(scope="module")
def golden():
    """The plain golden vectors of both kinds, by the struct that each has."""
    logits = np.random.default_rng(0).normal(size=(len(TOKENS), tiny.VOCAB)).astype(np.float32)
    decoder = json.loads(to_canonical_json(decoder_golden(logits, 0.1)))
    encoder = json.loads(to_canonical_json(encoder_golden(tiny.weights())))
    return {"EncoderGolden": encoder} | dict.fromkeys(("GoldenSet", "DecoderGolden", "GoldenCheck"), decoder)


@pytest.fixture
def refusal(sound, golden, tmp_path_factory):
    """A function: struct and change of its plain JSON → the one line with which its file is refused."""

    def load(struct: str, change) -> None:
        root = ROOT_OF[struct]
        if root is Manifest:
            reseal(sound, lambda plain: change(inside(plain, struct)))
            open_bundle(sound)
        elif root is GoldenSet:
            plain = copy.deepcopy(golden[struct])
            change(inside(plain, struct))
            spec = tiny.encoder_spec() if struct == "EncoderGolden" else tiny.decoder_spec()
            check_golden(parse_golden(json.dumps(plain).encode(), "golden.json"), spec, "golden.json")
        else:
            plain = {"add_bos": True, "bos_token": "<s>"}
            change(plain)
            parse_tokenizer_config(json.dumps(plain).encode(), "tokenizer_config.json")

    before = (sound / "manifest.json").read_bytes()

    def of(struct: str, change) -> str:
        try:
            with pytest.raises(BundleError) as caught:
                load(struct, change)
        finally:
            (sound / "manifest.json").write_bytes(before)
        message = str(caught.value)
        assert message and "\n" not in message and len(message) < 900
        return message

    load("TokenizerConfig", lambda plain: None)
    load("EncoderGolden", lambda plain: None)
    load("DecoderGolden", lambda plain: None)
    return of


def inside(plain: Any, struct: str) -> Any:
    """The part of a document that is a struct of that name."""
    for step in PLACES[struct]:
        plain = plain[step]
    return plain


def named(struct: str, field: str, message: str) -> bool:
    """Whether the line names the field."""
    return any(word in message for word in (field, *ALIASES.get((struct, field), ())))


def test_every_field_has_its_fixtures():
    """A field that is new, gone or renamed has to be treated here."""
    assert set(ILLEGAL) == set(FIELDS)
    assert set(PLACES) == {struct for struct, _ in FIELDS}


# the digest is tested below: a manifest that is sealed anew has a new one
@pytest.mark.parametrize(("struct", "field"), [f for f in FIELDS if f != ("Manifest", "bundle_id")])
def test_a_damaged_field(struct, field, refusal):
    """Of a wrong type, out of range, or gone where it is needed: refused by name."""
    described = FIELDS[struct, field]
    wrong = [value for value in ONE_OF_EACH if not fits(value, described.type)]
    assert wrong
    for value in (*wrong, *ILLEGAL[struct, field]):
        message = refusal(struct, lambda plain, value=value: plain.update({field: value}))
        assert named(struct, field, message), (value, message)
    if described.required:
        assert field in refusal(struct, lambda plain: plain.pop(field))


@pytest.mark.parametrize("struct", PLACES)
def test_an_unknown_key(struct, refusal):
    """A key that the schema lacks is refused by name, in every record."""
    for key in ("evil", "__class__", "Type"):
        assert key in refusal(struct, lambda plain, key=key: plain.update({key: 1}))


@pytest.mark.parametrize("tag", ["", "Decoder", "encoder", "gate", 1, None, []])
def test_a_spec_of_another_kind(tag, refusal):
    """The word that says which spec it is: absent, unknown, or another's."""
    assert "spec" in refusal("DecoderSpec", lambda plain: plain.update(type=tag))
    assert "type" in refusal("DecoderSpec", lambda plain: plain.pop("type"))


@pytest.mark.parametrize("value", [*NO_SHA256, "0" * 64, None, 1, True, [], {}])
def test_a_digest_that_is_not_the_manifests(value, sound, tmp_path):
    """`bundle_id` is a digest, and that of this very manifest."""
    root = shutil.copytree(sound, tmp_path / "bundle")
    plain = json.loads((root / "manifest.json").read_bytes())
    for change in ({"bundle_id": value}, {"version": plain["version"] + 1}):
        text = json.dumps({**plain, **change}, sort_keys=True, separators=(",", ":"))
        (root / "manifest.json").write_text(text + "\n")
        with pytest.raises(BundleError, match="bundle_id"):
            open_bundle(root)


def test_every_listed_file_is_hashed(sound, tmp_path):
    """One changed byte in any file of a bundle is found, and the line names the file."""
    root = shutil.copytree(sound, tmp_path / "bundle")
    entries = open_bundle(root).manifest.entries
    assert {entry.path for entry in entries} == {
        path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()
    } - {"manifest.json"}
    for entry in entries:
        data = (root / entry.path).read_bytes()
        assert hashlib.sha256(data).hexdigest() == entry.sha256
        (root / entry.path).write_bytes(bytes([data[0] ^ 1]) + data[1:])
        with pytest.raises(BundleError, match="SHA-256") as caught:
            open_bundle(root)
        assert str(caught.value).startswith(f"{entry.path}: ")
        (root / entry.path).write_bytes(data)
