"""Fields of config.json that speak of mathematics which the model's family does not have.

transformers (and llama.cpp, for GGUF metadata) leaves them unused as well, so that the export is what they
compute; but who wrote them may have meant another model, so each is a warning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from edge_export.checkpoint.families import Family
from edge_export.checkpoint.files import read_json

#: of Granite, MiniCPM, Cohere, OLMo, SmolLM3, NeoX, DeepSeek and others
_FIELDS: Final = (
    *("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling", "logit_scale"),
    *("scale_emb", "scale_depth", "dim_model_base", "clip_qkv", "qkv_clip", "no_rope_layers", "alibi"),
    *("no_rope_layer_interval", "rotary_pct", "rope_pct", "use_qk_norm", "qk_norm", "qk_layernorm"),
    *("num_experts", "num_local_experts", "n_routed_experts", "kv_lora_rank", "q_lora_rank"),
    *("use_parallel_residual", "parallel_attn", "attn_temperature_tuning", "num_nextn_predict_layers"),
)
#: keys of GGUF metadata below the architecture
GGUF_FIELDS: Final = (
    *("attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias", "attention.temperature_scale"),
    *("logit_scale", "residual_scale", "embedding_scale", "use_parallel_residual", "nextn_predict_layers"),
    *("attn_logit_softcapping", "pooling_type"),
)
_SHOWN_CHARS: Final = 60


def foreign_fields(path: Path, family: Family) -> tuple[str, ...]:
    """Warnings about fields of the config.json at `path`. Raises CheckpointError if it cannot be read."""
    whole = read_json(path, dict[str, Any])
    text = whole.get("text_config")
    stated = {**whole, **text} if isinstance(text, dict) else whole
    fields = (*_FIELDS, *(() if family.name == "gemma3" else ("final_logit_softcapping",)))
    warnings = [_unused(str(path), field, stated[field], family) for field in fields if _means(stated, field)]
    if stated.get("auto_map"):
        warnings.append(
            f"{path}: the model has code of its own (auto_map), which is not run; the weights are taken for "
            f"those of a plain {family.name}"
        )
    return (*warnings, *_architecture(str(path), whole.get("architectures"), family))


def foreign_metadata(
    metadata: Mapping[str, Any], family: Family, architecture: str, where: str
) -> tuple[str, ...]:
    """Warnings about keys of a GGUF file's metadata."""
    fields = (*GGUF_FIELDS, *(() if family.name == "gemma3" else ("final_logit_softcapping",)))
    keys = [f"{architecture}.{field}" for field in fields]
    return tuple(_unused(where, key, metadata[key], family) for key in keys if _means(metadata, key))


def _means(stated: Mapping[str, Any], field: str) -> bool:
    value = stated.get(field)
    # 0 and 1 are how a sum, a count or a factor says that it does nothing
    return value not in (0, 1) if isinstance(value, (int, float)) and value is not True else bool(value)


def _unused(where: str, field: str, value: Any, family: Family) -> str:
    return (
        f"{where}: {field} is {str(value)[:_SHOWN_CHARS]}, which {family.name} models do not have; it is not "
        "used"
    )


def _architecture(where: str, stated: Any, family: Family) -> tuple[str, ...]:
    if not isinstance(stated, list) or not stated:
        return ()
    names = [str(name)[:_SHOWN_CHARS] for name in stated]
    ends = ("forcausallm", "model", "forconditionalgeneration")
    if any(n.lower().startswith(family.name) and n.lower().endswith(ends) for n in names):
        return ()
    return (
        f"{where}: made for {', '.join(names[:3])}; the weights are taken for those of a plain {family.name}",
    )
