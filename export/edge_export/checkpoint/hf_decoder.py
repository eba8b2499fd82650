"""Decoders in Hugging Face directories: config.json, generation_config.json, tokenizer.json, safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from edge_export.checkpoint.families import Family, family_of_model_type
from edge_export.checkpoint.files import generation_eos, read_json, special_tokens, token_ids, without_nulls
from edge_export.checkpoint.foreign import tensors_are
from edge_export.checkpoint.foreign_fields import foreign_fields
from edge_export.checkpoint.hf_config import RawConfig, decoder_config
from edge_export.checkpoint.leftovers import (
    HARMLESS_IN_DECODERS,
    OTHER_MODALITIES,
    fill_missing_biases,
    refuse_leftovers,
)
from edge_export.checkpoint.safetensors_files import SafetensorsFiles
from edge_export.checkpoint.source import CheckpointSource, OpenedDecoder, Placement
from edge_export.checkpoint.tokenizer_files import END_OF_GENERATION
from edge_export.model.config import DecoderConfig
from edge_export.model.tensors import tensor_shapes
from edge_reasoner.errors import CheckpointError

_LAYER_PARTS: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "o": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
#: where there are norms on the branches, "post attention" means what it says
_POST_NORM_PARTS: Mapping[str, str] = {
    "attn_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
#: where the text model's tensors may sit: plain, bare, and within vision-language models old and new
_PREFIXES = ("model.", "", "language_model.model.", "model.language_model.")
_HEADS = ("lm_head.weight", "language_model.lm_head.weight")


def read_config(path: Path) -> tuple[RawConfig, bool]:
    """config.json; of a vision-language model its text part, and whether it is one."""
    whole = read_json(path, dict[str, Any])
    text = whole.get("text_config")
    multimodal = isinstance(text, dict)
    if isinstance(text, dict):
        outer: dict[str, Any] = {
            key: whole[key] for key in ("eos_token_id", "bos_token_id", "tie_word_embeddings") if key in whole
        }
        whole = {"model_type": whole.get("model_type"), **outer, **text}
    try:
        return msgspec.convert(without_nulls(whole, RawConfig), RawConfig), multimodal
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _eos_ids(raw: RawConfig, directory: Path) -> tuple[int, ...]:
    ids = generation_eos(directory) + token_ids(raw.eos_token_id)
    vocabulary = raw.vocab_size if isinstance(raw.vocab_size, int) else 0
    markers = [token for content, token in special_tokens(directory).items() if content in END_OF_GENERATION]
    ids += [token for token in markers if 0 <= token < vocabulary]
    return tuple(dict.fromkeys(ids))


def _prefix(files: SafetensorsFiles) -> str:
    for prefix in _PREFIXES:
        if files.has(f"{prefix}embed_tokens.weight"):
            return prefix
    hint = tensors_are(files.names())
    raise CheckpointError(
        f"{files.directory}: the tensor 'model.embed_tokens.weight' is missing"
        + (f"; {hint}" if hint else "")
    )


def _placements(config: DecoderConfig, family: Family, files: SafetensorsFiles) -> dict[str, Placement]:
    prefix = _prefix(files)
    head = next((name for name in _HEADS if files.has(name)), _HEADS[0])
    tops = {"embed": f"{prefix}embed_tokens.weight", "norm": f"{prefix}norm.weight", "head": head}
    parts = {**_LAYER_PARTS, **(_POST_NORM_PARTS if family.post_norms else {})}
    placements = {}
    for name, shape in tensor_shapes(config).items():
        *layer, part, kind = name.split(".")
        raw = f"{prefix}layers.{layer[1]}.{parts[part]}.{kind}" if layer else tops[part]
        placements[name] = Placement(raw, shape, offset=family.norm_offset if part.endswith("norm") else 0.0)
    return placements


def _stores_bias(files: SafetensorsFiles, layers: int) -> bool:
    """Whether a q, k or v of some layer has a bias, whatever config.json says of it."""
    prefix = _prefix(files)
    names = (f"{prefix}layers.{i}.{_LAYER_PARTS[part]}.bias" for i in range(layers) for part in "qkv")
    return any(files.has(name) for name in names)


def _with_biases(
    config: DecoderConfig, files: SafetensorsFiles, where: str
) -> tuple[DecoderConfig, tuple[str, ...]]:
    """The configuration with q, k and v biases where they are stored; a warning where that is a surprise."""
    if config.qkv_bias or not _stores_bias(files, len(config.layers)):
        return config, ()
    warning = (
        f"{where}: says nothing of biases on q, k and v (attention_bias), but some of 'q_proj.bias', "
        "'k_proj.bias', 'v_proj.bias' are stored; they are used"
    )
    return replace(config, qkv_bias=True), (warning,)


def _account(
    config: DecoderConfig, source: CheckpointSource, files: SafetensorsFiles, *, multimodal: bool
) -> tuple[str, ...]:
    """Warnings of what is left out. Raises CheckpointError for tensors that the graph would have to use."""
    names, used, warnings = files.names(), set(source.raw_names), []
    if multimodal:
        others = [name for name in names if OTHER_MODALITIES.fullmatch(name)]
        used.update(others)
        if others:
            warnings.append(
                f"{files.directory}: {len(others)} tensors of other modalities ({others[0]!r} …) are left "
                "out: the text model is exported"
            )
    if config.tied_embeddings:
        embedding = next(name for name in source.raw_names if name.endswith("embed_tokens.weight"))
        for head in filter(files.has, _HEADS):
            if not files.same_values(head, embedding):
                raise CheckpointError(
                    f"{files.directory}: {head!r} differs from the embedding, but config.json says that "
                    "they are tied (tie_word_embeddings); set it to false to use the head, or remove it"
                )
            used.add(head)
    where = str(files.directory)
    refuse_leftovers(files, names, used, HARMLESS_IN_DECODERS, where, blocks=len(config.layers))
    return (*warnings, *files.warnings)


def load_hf_decoder(directory: Path) -> OpenedDecoder:
    """Configuration and weights. Reads headers only (and a stored head beside a tied embedding).

    Raises CheckpointError for what is missing, misshapen, unsupported, or stored and not used.
    """
    path = directory / "config.json"
    raw, multimodal = read_config(path)
    family = family_of_model_type(raw.model_type, str(path))
    config = decoder_config(raw, family, _eos_ids(raw, directory), path)
    files = SafetensorsFiles(directory)
    config, surprised = _with_biases(config, files, str(path))
    placements = _placements(config, family, files)
    filled: tuple[str, ...] = ()
    if surprised:  # where config.json announces biases, all of them must be there
        placements, filled = fill_missing_biases(files, placements, str(directory))
    source = CheckpointSource(files, placements, str(directory))
    left = _account(config, source, files, multimodal=multimodal)
    foreign = foreign_fields(path, family)
    return OpenedDecoder(config, source, files.files, (*foreign, *surprised, *filled, *left))
