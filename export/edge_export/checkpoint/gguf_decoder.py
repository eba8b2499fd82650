"""Decoders in GGUF files: their configuration from the metadata, their tensors under canonical names.

Follows what llama.cpp does when it loads the same file, defaults included.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import numpy as np

from edge_export.checkpoint.families import Family, family_of_architecture
from edge_export.checkpoint.foreign_fields import foreign_metadata
from edge_export.checkpoint.gguf_file import GgufFile
from edge_export.checkpoint.leftovers import HARMLESS_IN_GGUF, fill_missing_biases, refuse_leftovers
from edge_export.checkpoint.limits import check_consistent, check_range
from edge_export.checkpoint.source import CheckpointSource, OpenedDecoder, Placement
from edge_export.checkpoint.tokenizer_files import END_OF_GENERATION, UNSET_ID
from edge_export.model.config import DecoderConfig, LayerConfig, Rope
from edge_export.model.tensors import tensor_shapes
from edge_reasoner.errors import CheckpointError

#: layer-local canonical part → GGUF part, below `blk.{i}.`
_LAYER_PARTS: Mapping[str, str] = {
    "attn_norm": "attn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "o": "attn_output",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
}
_TOP_PARTS: Mapping[str, str] = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
#: `general.type` or `general.architecture` → what such a file is
_NO_MODELS: Mapping[str, str] = {
    "adapter": "an adapter (LoRA), not a model; merge it into its model first (llama-export-lora)",
    "mmproj": "a multimodal projector (mmproj); give the text model's file beside it",
    "clip": "a multimodal projector (mmproj); give the text model's file beside it",
    "vocab": "a vocabulary alone; give the model itself",
    "imatrix": "an importance matrix, not a model",
    "controlvector": "a control vector, not a model",
}
_GEMMA3_PATTERN_LAYERS = 6
_GEMMA3_27B_LAYERS = 62
_LOCAL_ROPE_THETA = 10_000.0


class Metadata:
    """Typed, range-checked look-ups in a GGUF file's metadata; `{arch}.` is put before every key."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self._values = file.metadata
        self._prefix = architecture
        self.where = str(file.path)

    def _raw(self, key: str) -> Any:
        return self._values.get(f"{self._prefix}.{key}")

    def _bad(self, key: str, value: Any, allowed: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: metadata {self._prefix}.{key} is {str(value)[:80]!r}; {allowed}"
        )

    def integer(self, key: str, kind: str, default: int | None = None) -> int:
        """An integer within RANGES[kind]; the default if absent, an error if there is none."""
        value = self._raw(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.where}: metadata {self._prefix}.{key} is missing")
        if type(value) is not int:
            raise self._bad(key, value, "it must be an integer")
        check_range(self.where, f"metadata {self._prefix}.{key}", value, kind)
        return value

    def number(self, key: str, kind: str, default: float | None = None) -> float:
        """A number within RANGES[kind]; the default if absent, an error if there is none."""
        value = self._raw(key)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.where}: metadata {self._prefix}.{key} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._bad(key, value, "it must be a number")
        check_range(self.where, f"metadata {self._prefix}.{key}", float(value), kind)
        return float(value)

    def optional_number(self, key: str, kind: str) -> float | None:
        """A number within RANGES[kind], or None if absent or 0 (llama.cpp's way of saying none)."""
        return self.number(key, kind) if self._raw(key) else None

    def text(self, key: str, default: str) -> str:
        """A string; the default if absent."""
        value = self._raw(key)
        if value is not None and not isinstance(value, str):
            raise self._bad(key, value, "it must be a string")
        return default if value is None else value

    def per_layer(self, key: str, kind: str, layers: int, default: list[int] | None = None) -> list[int]:
        """One integer per layer, from one value for all or an array of `layers`."""
        value = self._raw(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, np.ndarray):
            return [self.integer(key, kind)] * layers
        if len(value) != layers or value.dtype.kind not in "iu":
            raise self._bad(key, value.tolist(), f"it must hold {layers} integers, one per layer")
        for item in value.tolist():
            check_range(self.where, f"metadata {self._prefix}.{key}", item, kind)
        return [int(item) for item in value]

    def local_layers(self, layers: int) -> list[bool]:
        """Which layers attend locally: an array of booleans, or a period whose last layer is global."""
        key = "attention.sliding_window_pattern"
        value = self._raw(key)
        if isinstance(value, np.ndarray):
            if len(value) != layers:
                raise self._bad(key, value.tolist(), f"it must hold {layers} flags, one per layer")
            return [bool(item) for item in value]
        period = self.integer(key, "pattern", _GEMMA3_PATTERN_LAYERS)
        return [index % period < period - 1 for index in range(layers)]


def _global_rope(file: GgufFile, metadata: Metadata, family: Family) -> Rope:
    scaling = metadata.text("rope.scaling.type", "linear")
    if scaling not in ("none", "linear"):
        raise CheckpointError(
            f"{metadata.where}: rotary scaling {scaling[:40]!r} is not supported; supported in GGUF: "
            "none, linear, and Llama 3's frequency factors"
        )
    if metadata.number("rope.scaling.attn_factor", "scale", 1.0) != 1.0:
        raise CheckpointError(
            f"{metadata.where}: rotary scaling with an attention factor (rope.scaling.attn_factor) is not "
            "supported; it must be 1"
        )
    factor = metadata.optional_number("rope.scaling.factor", "rope_factor")
    factor = factor or metadata.optional_number("rope.scale_linear", "rope_factor")
    factors = None
    if family.gguf_interleaved_rotary and "rope_freqs.weight" in file.tensors:
        stored = file.rows("rope_freqs.weight", 0, file.shape("rope_freqs.weight")[0]).flatten().tolist()
        for item in stored:
            check_range(metadata.where, "a value of rope_freqs.weight", item, "rope_factor")
        factors = tuple(stored)
    return Rope(
        theta=metadata.number("rope.freq_base", "rope_theta", 10_000.0),
        linear_factor=1.0 if scaling == "none" or factor is None else factor,
        frequency_factors=factors,
    )


def _layers(file: GgufFile, metadata: Metadata, family: Family, hidden: int) -> tuple[LayerConfig, ...]:
    count = metadata.integer("block_count", "num_layers")
    heads = metadata.per_layer("attention.head_count", "num_heads", count)
    kv_heads = metadata.per_layer("attention.head_count_kv", "num_heads", count, heads)
    widths = metadata.per_layer("feed_forward_length", "ffn_width", count)
    head_dim = metadata.integer("attention.key_length", "head_dim", hidden // heads[0])
    for key in ("attention.value_length", "rope.dimension_count"):
        if metadata.integer(key, "head_dim", head_dim) != head_dim:
            raise CheckpointError(
                f"{metadata.where}: {key} differs from the head size {head_dim}; they must be equal"
            )
    rope = _global_rope(file, metadata, family)
    window = metadata.integer("attention.sliding_window", "window", 0)
    local = [False] * count
    local_rope = rope
    if family.name == "gemma3" and window:
        local = metadata.local_layers(count)
        local_rope = Rope(metadata.number("rope.freq_base_swa", "rope_theta", _LOCAL_ROPE_THETA))
    return tuple(
        LayerConfig(
            num_heads=heads[index],
            num_kv_heads=kv_heads[index],
            head_dim=head_dim,
            ffn_width=widths[index],
            rope=local_rope if local[index] else rope,
            sliding_window_tokens=window if local[index] else None,
        )
        for index in range(count)
    )


def _special_id(file: GgufFile, key: str) -> int | None:
    """A special token's id; None where the file states none (-1 as an unsigned number says none too)."""
    value = file.metadata.get(f"tokenizer.ggml.{key}")
    return value if type(value) is int and value != UNSET_ID else None


def end_token_ids(file: GgufFile) -> tuple[int, ...]:
    """The ids that end a turn: the metadata's, and the well-known end markers in the vocabulary.

    As in llama.cpp, a marker counts whatever type its token has: published Gemma files get the type wrong.
    """
    metadata = file.metadata
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    found = [value for key in keys if (value := _special_id(file, key)) is not None]
    tokens = metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, list):
        found += [index for index, token in enumerate(tokens) if token in END_OF_GENERATION]
    return tuple(dict.fromkeys(found))


def _config(file: GgufFile, family: Family) -> DecoderConfig:
    where = str(file.path)
    metadata = Metadata(file, family.gguf_architecture or family.name)
    if metadata.integer("expert_count", "window", 0):
        raise CheckpointError(f"{where}: mixtures of experts are not supported; supported are dense decoders")
    hidden = metadata.integer("embedding_length", "hidden_size")
    layers = _layers(file, metadata, family, hidden)
    attention_scale = None
    if family.name == "gemma3" and len(layers) == _GEMMA3_27B_LAYERS:
        attention_scale = 1.0 / sqrt(hidden // layers[0].num_heads)  # as llama.cpp does for the 27B
    vocab_size = file.shape("token_embd.weight")[0]
    check_range(where, "the number of rows of token_embd.weight", vocab_size, "vocab_size")
    return DecoderConfig(
        family=family.name,
        vocab_size=vocab_size,
        hidden_size=hidden,
        layers=layers,
        norm_epsilon=metadata.number("attention.layer_norm_rms_epsilon", "norm_epsilon"),
        context_tokens=metadata.integer("context_length", "context_tokens"),
        activation=family.activation,
        tied_embeddings=_tied(file),
        qkv_bias=any(
            f"blk.{i}.attn_{part}.bias" in file.tensors for i in range(len(layers)) for part in "qkv"
        ),
        qk_norm=family.qk_norm,
        post_norms=family.post_norms,
        embedding_scale=sqrt(hidden) if family.scaled_embedding else 1.0,
        attention_scale=attention_scale,
        logit_softcap=(
            metadata.optional_number("final_logit_softcapping", "softcap")
            if family.name == "gemma3"
            else None
        ),
        bos_token_id=_special_id(file, "bos_token_id"),
        eos_token_ids=end_token_ids(file),
    )


def _tied(file: GgufFile) -> bool:
    """Tied if there is no head, or one that repeats the embedding byte for byte."""
    return "output.weight" not in file.tensors or file.same_bytes("output.weight", "token_embd.weight")


def _placements(config: DecoderConfig, family: Family) -> dict[str, Placement]:
    placements = {}
    for name, shape in tensor_shapes(config).items():
        *layer, part, kind = name.split(".")
        raw = f"blk.{layer[1]}.{_LAYER_PARTS[part]}.{kind}" if layer else f"{_TOP_PARTS[part]}.{kind}"
        heads = 0
        if family.gguf_interleaved_rotary and part in ("q", "k"):
            settings = config.layers[int(layer[1])]
            heads = settings.num_heads if part == "q" else settings.num_kv_heads
        placements[name] = Placement(raw, shape, interleaved_heads=heads)
    return placements


def _refuse_parts(file: GgufFile) -> None:
    if type(parts := file.metadata.get("split.count", 0)) is int and parts > 1:
        raise CheckpointError(
            f"{file.path}: one of {parts} GGUF parts; join them with `llama-gguf-split --merge` and give "
            "the result"
        )


def _refuse_other_kinds(file: GgufFile) -> None:
    """GGUF files that are no models by themselves."""
    kind, architecture = file.metadata.get("general.type"), file.metadata.get("general.architecture")
    what = _NO_MODELS.get(kind if isinstance(kind, str) else "") or _NO_MODELS.get(
        architecture if isinstance(architecture, str) else ""
    )
    if what is not None:
        raise CheckpointError(f"{file.path}: {what}")
    if not file.tensors:
        raise CheckpointError(f"{file.path}: holds no tensors (a vocabulary alone?); give the model itself")


def _refuse_unsupported(file: GgufFile) -> None:
    where = str(file.path)
    if file.metadata.get(f"{file.metadata.get('general.architecture')}.attention.causal") is False:
        raise CheckpointError(f"{where}: attention.causal is false; only models that look back are exported")
    if "blk.0.attn_qkv.weight" in file.tensors:
        raise CheckpointError(f"{file.path}: fused q/k/v tensors are not supported; convert without fusing")


def load_gguf_decoder(file: GgufFile) -> OpenedDecoder:
    """The configuration and the weights of a decoder's GGUF file.

    Raises CheckpointError if the architecture is not supported, the metadata is missing or out of range, or a
    tensor is missing, misshapen, of a type that is not a weight, or stored and not used. Reads no weights.
    """
    _refuse_parts(file)
    _refuse_other_kinds(file)
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(f"{file.path}: the metadata has no general.architecture; is it a model?")
    family = family_of_architecture(architecture, str(file.path))
    _refuse_unsupported(file)
    config = check_consistent(_config(file, family), str(file.path))
    where = str(file.path)
    placements, warnings = fill_missing_biases(file, _placements(config, family), where)
    source = CheckpointSource(file, placements, where)
    stored = [placement.raw_name for placement in placements.values() if not placement.zeros]
    for raw in {file.tensors[name].type_name: name for name in stored}.values():
        file.check_dequantizable(raw)
    used = {*source.raw_names, *_used_elsewhere(config, family)}
    refuse_leftovers(file, file.tensors, used, HARMLESS_IN_GGUF, where, blocks=len(config.layers))
    foreign = foreign_metadata(file.metadata, family, architecture, where)
    return OpenedDecoder(config, source, (file.path,), (*foreign, *warnings))


def _used_elsewhere(config: DecoderConfig, family: Family) -> set[str]:
    """Tensors that became part of the configuration."""
    head = {"output.weight"} if config.tied_embeddings else set()
    return head | ({"rope_freqs.weight"} if family.gguf_interleaved_rotary else set())
