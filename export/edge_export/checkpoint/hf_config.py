"""config.json of the supported families → `DecoderConfig`, with transformers' defaults for what is left out.

Knows both ways of writing rotary embeddings: `rope_theta` + `rope_scaling` (transformers 4) and
`rope_parameters` (transformers 5; for Gemma 3 one entry per kind of layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from edge_export.checkpoint.families import Family
from edge_export.checkpoint.foreign import quantization_named
from edge_export.checkpoint.limits import check_consistent, check_range
from edge_export.model.config import DecoderConfig, LayerConfig, Rope
from edge_reasoner.errors import CheckpointError

_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_QWEN_MAX_WINDOW_LAYERS = 28


class RopeParameters(msgspec.Struct):
    """`rope_scaling` or one entry of `rope_parameters`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None
    partial_rotary_factor: float | None = None


class RawConfig(msgspec.Struct):
    """The fields of config.json that matter here; UNSET = left out, None = null."""

    model_type: str
    vocab_size: int | UnsetType = UNSET
    hidden_size: int | UnsetType = UNSET
    intermediate_size: int | UnsetType = UNSET
    num_hidden_layers: int | UnsetType = UNSET
    num_attention_heads: int | UnsetType = UNSET
    num_key_value_heads: int | UnsetType | None = UNSET
    head_dim: int | UnsetType | None = UNSET
    max_position_embeddings: int | UnsetType = UNSET
    rms_norm_eps: float = 1e-6
    rope_theta: float | UnsetType = UNSET
    rope_local_base_freq: float | UnsetType = UNSET
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    sliding_window: int | UnsetType | None = UNSET
    sliding_window_pattern: int | UnsetType = UNSET
    use_sliding_window: bool = False
    max_window_layers: int = _QWEN_MAX_WINDOW_LAYERS
    layer_types: list[str] | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    use_bidirectional_attention: bool | None = None
    query_pre_attn_scalar: float | UnsetType = UNSET
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool | UnsetType | None = UNSET
    bos_token_id: int | None = None
    eos_token_id: int | list[int | None] | None = None
    quantization_config: dict[str, Any] | None = None
    #: as compressed-tensors and MLX write it
    compression_config: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    is_causal: bool = True
    #: llama3's, at the top level, wins over the one among the rotary parameters
    original_max_position_embeddings: int | None = None


class _Reader:
    """Look-ups in a RawConfig that fall back to the family's defaults and check ranges."""

    def __init__(self, raw: RawConfig, family: Family, where: str) -> None:
        self.raw, self.family, self.where = raw, family, where

    def integer(self, field: str, kind: str, if_null: int | None = None) -> int:
        """A field or its family default; `if_null` if it is null, or if it has no default."""
        value = getattr(self.raw, field)
        if value is UNSET:
            default = self.family.defaults.get(field)
            value = if_null if default is None else int(default)
        elif value is None:
            value = if_null
        if value is None:
            raise CheckpointError(f"{self.where}: {field} is missing")
        check_range(self.where, field, value, kind)
        return int(value)

    def number(self, field: str, kind: str) -> float:
        """A field or its family default."""
        value = getattr(self.raw, field)
        value = self.family.defaults.get(field) if value is UNSET else value
        if value is None:
            raise CheckpointError(f"{self.where}: {field} is missing")
        check_range(self.where, field, value, kind)
        return float(value)

    def window(self) -> int | None:
        """`sliding_window`, by family default if left out; None for null or 0."""
        value = self.raw.sliding_window
        if value is UNSET:
            default = self.family.defaults.get("sliding_window")
            value = None if default is None else int(default)
        if not value:
            return None
        check_range(self.where, "sliding_window", value, "window")
        return value


def _rope_entry(where: str, value: object) -> RopeParameters:
    try:
        return msgspec.convert(value, RopeParameters)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{where}: rotary parameters: {error}") from error


def _rope(reader: _Reader, entry: RopeParameters, default_theta: float) -> Rope:
    where, kind = reader.where, entry.rope_type or entry.type or "default"
    theta = default_theta if entry.rope_theta is None else entry.rope_theta
    check_range(where, "rope_theta", theta, "rope_theta")
    partial = entry.partial_rotary_factor or reader.raw.partial_rotary_factor or 1.0
    if partial != 1.0:
        raise CheckpointError(f"{where}: partial_rotary_factor is {partial}; allowed is 1.0")
    if kind == "default":
        return Rope(theta)
    if kind not in ("linear", "llama3"):
        raise CheckpointError(
            f"{where}: rotary scaling {kind[:40]!r} is not supported; supported: default, linear, llama3"
        )
    if entry.factor is None:
        raise CheckpointError(f"{where}: rotary scaling {kind!r} has no factor")
    check_range(where, "the rotary scaling factor", entry.factor, "rope_factor")
    if kind == "linear":
        return Rope(theta, linear_factor=entry.factor)
    low, high = entry.low_freq_factor, entry.high_freq_factor
    context = reader.raw.original_max_position_embeddings or entry.original_max_position_embeddings
    if low is None or high is None or context is None or not 0 < low < high or context < 1:
        raise CheckpointError(
            f"{where}: llama3 rotary scaling needs 0 < low_freq_factor < high_freq_factor and "
            "original_max_position_embeddings > 0"
        )
    return Rope(
        theta,
        llama3_factor=entry.factor,
        llama3_low_freq_factor=low,
        llama3_high_freq_factor=high,
        llama3_original_context_tokens=context,
    )


def _ropes(reader: _Reader) -> tuple[Rope, Rope]:
    """(rope of global layers, rope of local layers)."""
    raw, where = reader.raw, reader.where
    parameters = raw.rope_parameters or {}
    theta = reader.number("rope_theta", "rope_theta")
    if reader.family.name != "gemma3":
        if parameters and raw.rope_scaling and parameters != raw.rope_scaling:
            raise CheckpointError(
                f"{where}: rope_scaling and rope_parameters disagree; leave one of them out"
            )
        stated = parameters or raw.rope_scaling or {}
        if nested := [name for name, value in stated.items() if isinstance(value, dict)]:
            raise CheckpointError(
                f"{where}: rotary parameters for {nested[0][:40]!r} alone; {reader.family.name} has one kind "
                "for all layers"
            )
        rope = _rope(reader, _rope_entry(where, stated), theta)
        return rope, rope
    if parameters and not parameters.keys() & {_GLOBAL, _LOCAL}:
        raise CheckpointError(
            f"{where}: rope_parameters must have an entry for {_GLOBAL!r} and one for {_LOCAL!r}"
        )
    local_theta = reader.number("rope_local_base_freq", "rope_theta")
    # as in transformers, where both are stated
    whole = _rope_entry(where, {**(parameters.get(_GLOBAL) or {}), **(raw.rope_scaling or {})})
    local = _rope_entry(where, parameters.get(_LOCAL) or {})
    return _rope(reader, whole, theta), _rope(reader, local, local_theta)


def _layer_kinds(reader: _Reader, layers: int) -> list[str]:
    raw, family = reader.raw, reader.family.name
    if family == "llama":
        return [_GLOBAL] * layers
    if family == "mistral":
        return [_LOCAL] * layers
    if raw.layer_types is not None:
        if len(raw.layer_types) != layers or not set(raw.layer_types) <= {_LOCAL, _GLOBAL}:
            raise CheckpointError(
                f"{reader.where}: layer_types must hold {layers} entries, each {_LOCAL!r} or {_GLOBAL!r}"
            )
        return raw.layer_types
    if family == "gemma3":
        period = reader.integer("sliding_window_pattern", "pattern")
        return [_LOCAL if (index + 1) % period else _GLOBAL for index in range(layers)]
    return [_LOCAL if index >= raw.max_window_layers else _GLOBAL for index in range(layers)]


def _layers(reader: _Reader) -> tuple[LayerConfig, ...]:
    raw = reader.raw
    count = reader.integer("num_hidden_layers", "num_layers")
    heads = reader.integer("num_attention_heads", "num_heads")
    kv_heads = reader.integer("num_key_value_heads", "num_heads", if_null=heads)
    head_dim = reader.integer("head_dim", "head_dim", reader.integer("hidden_size", "hidden_size") // heads)
    ffn_width = reader.integer("intermediate_size", "ffn_width")
    window = reader.window()
    if reader.family.name in ("qwen2", "qwen3") and not raw.use_sliding_window:
        window = None
    global_rope, local_rope = _ropes(reader)
    return tuple(
        LayerConfig(
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            ffn_width=ffn_width,
            rope=local_rope if kind == _LOCAL else global_rope,
            sliding_window_tokens=window if kind == _LOCAL else None,
        )
        for kind in _layer_kinds(reader, count)
    )


def _refuse_unsupported(reader: _Reader) -> None:
    raw, where, family = reader.raw, reader.where, reader.family
    for field in ("quantization_config", "compression_config", "quantization"):
        if entry := getattr(raw, field):
            method = quantization_named(entry)
            how = f" with {method!r}" if method else ""
            raise CheckpointError(
                f"{where}: the weights are quantized{how} ({field}); allowed are plain safetensors, or GGUF"
            )
    if not raw.is_causal:
        raise CheckpointError(f"{where}: is_causal is false; only models that look back are exported")
    if raw.mlp_bias:
        raise CheckpointError(f"{where}: mlp_bias is not supported; it must be false")
    if raw.use_bidirectional_attention or raw.attn_logit_softcapping:
        raise CheckpointError(
            f"{where}: neither use_bidirectional_attention nor attn_logit_softcapping is supported"
        )
    allowed = _ACTIVATIONS[family.activation]
    found = raw.hidden_activation if family.name == "gemma3" else raw.hidden_act
    if (found or allowed) != allowed:
        raise CheckpointError(
            f"{where}: the activation is {str(found)[:40]!r}; {family.name} allows {allowed!r}"
        )


def decoder_config(raw: RawConfig, family: Family, eos_token_ids: Sequence[int], path: Path) -> DecoderConfig:
    """The configuration that `raw` (from `path`) describes. Raises CheckpointError naming the field."""
    where = str(path)
    reader = _Reader(raw, family, where)
    _refuse_unsupported(reader)
    hidden = reader.integer("hidden_size", "hidden_size")
    check_range(where, "rms_norm_eps", raw.rms_norm_eps, "norm_epsilon")
    softcap = raw.final_logit_softcapping or None if family.name == "gemma3" else None
    if softcap is not None:
        check_range(where, "final_logit_softcapping", softcap, "softcap")
    scale = None
    if family.name == "gemma3":
        scale = reader.number("query_pre_attn_scalar", "scale") ** -0.5
    bos = None if raw.bos_token_id == -1 else raw.bos_token_id  # a way of saying none
    for token in eos_token_ids if bos is None else (bos, *eos_token_ids):
        check_range(where, "a special token id", token, "token_id")
    tied = raw.tie_word_embeddings
    return check_consistent(
        DecoderConfig(
            family=family.name,
            vocab_size=reader.integer("vocab_size", "vocab_size"),
            hidden_size=hidden,
            layers=_layers(reader),
            norm_epsilon=raw.rms_norm_eps,
            context_tokens=reader.integer("max_position_embeddings", "context_tokens"),
            activation=family.activation,
            tied_embeddings=family.tied_by_default if isinstance(tied, UnsetType) else bool(tied),
            qkv_bias=family.qkv_bias or raw.attention_bias,
            qk_norm=family.qk_norm,
            post_norms=family.post_norms,
            embedding_scale=sqrt(hidden) if family.scaled_embedding else 1.0,
            attention_scale=scale,
            logit_softcap=softcap,
            bos_token_id=bos,
            eos_token_ids=tuple(eos_token_ids),
        ),
        where,
    )
