"""Opens a BERT sentence encoder: a sentence-transformers directory or a plain BERT directory, safetensors.

`modules.json` and the pooling module's `config.json` decide how token states become one embedding (mean or
[CLS]); a plain BERT directory is pooled by the mean. The embedding is always L2-normalized, which changes no
cosine. Weights are read lazily under the canonical names of `model.config.EncoderConfig`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import torch

from edge_export.checkpoint.digest import WeightsDigest, digest_of
from edge_export.checkpoint.files import licence, read_json
from edge_export.checkpoint.json_file import is_there, read_json_object
from edge_export.checkpoint.leftovers import HARMLESS_IN_BERT, refuse_leftovers
from edge_export.checkpoint.limits import check_range
from edge_export.checkpoint.safetensors_files import SafetensorsFiles
from edge_export.checkpoint.source import CheckpointSource, Placement
from edge_export.checkpoint.tokenizer import load_tokenizer_files
from edge_export.checkpoint.tokenizer_files import TokenizerFiles
from edge_export.model.config import EncoderConfig, TensorSource
from edge_export.model.encoder import encoder_parameter_count, encoder_tensor_shapes
from edge_reasoner.errors import CheckpointError

_POSITIONS: Final = "embed.position.weight"
#: of the small files of sentence-transformers
_MAX_SETTINGS_BYTES = 1 << 20
_LAYER_PARTS: Final[Mapping[str, str]] = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "o": "attention.output.dense",
    "attn_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
_EMBEDDING_PARTS: Final[Mapping[str, str]] = {
    "embed.word": "embeddings.word_embeddings",
    "embed.position": "embeddings.position_embeddings",
    "embed.token_type": "embeddings.token_type_embeddings",
    "embed.norm": "embeddings.LayerNorm",
}
#: a bare BertModel, or one inside a model with a head
_PREFIXES: Final = ("", "bert.")
_POOLING_MODES: Final[Mapping[str, Literal["mean", "cls"]]] = {"mean": "mean", "cls": "cls"}
_LEGACY_POOLING: Final[Mapping[str, str]] = {"cls_token": "cls", "mean_tokens": "mean"}
_LEGACY_PREFIX: Final = "pooling_mode_"


class _BertConfig(msgspec.Struct):
    """The fields of config.json that matter here, with transformers' defaults."""

    model_type: str
    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    position_embedding_type: str | None = "absolute"
    is_decoder: bool = False
    add_cross_attention: bool = False
    pruned_heads: dict[str, Any] | None = None
    quantization_config: dict[str, Any] | None = None


class _Module(msgspec.Struct):
    path: str
    type: str


class _TransformerSettings(msgspec.Struct):
    max_seq_length: int | None = None


@dataclass(frozen=True)
class EncoderCheckpoint:
    """An opened sentence encoder: configuration checked, weights not yet read."""

    config: EncoderConfig
    source: TensorSource
    tokenizer: TokenizerFiles
    format: Literal["safetensors"]
    #: a human's name for the model
    name: str
    #: the directory it was opened from
    path: Path
    weights_files: tuple[Path, ...]
    #: as the model card states it, or None
    licence: str | None = None
    #: what the loader left out; whole sentences
    warnings: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of parameters of the encoder proper."""
        return encoder_parameter_count(self.config)

    @cached_property
    def digest(self) -> WeightsDigest:
        """SHA-256 and size of the weights files; read on first use."""
        return digest_of(self.weights_files)


class _FirstPositions:
    """`RawTensors` that shows only the first rows of the position table: the context may be shorter."""

    def __init__(self, raw: SafetensorsFiles, table: str, rows: int) -> None:
        self._raw, self._table, self._rows = raw, table, rows

    def names(self) -> Iterable[str]:
        return self._raw.names()

    def has(self, name: str) -> bool:
        return self._raw.has(name)

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._raw.shape(name)
        return (min(shape[0], self._rows), *shape[1:]) if name == self._table else shape

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self._raw.rows(name, start, stop)


def load_encoder(path: Path) -> EncoderCheckpoint:
    """Opens the sentence encoder in the directory `path`; reads headers, configuration and tokenizer only.

    Raises CheckpointError with one line for anything missing, corrupt or unsupported.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: an encoder is a directory with config.json and model.safetensors")
    modules = _modules(path)
    folder = path / modules["Transformer"] if modules else path
    pooling = _pooling(path / modules["Pooling"] / "config.json") if modules else None
    raw_config = read_json(folder / "config.json", _BertConfig)
    where = str(folder / "config.json")
    _refuse_unsupported(raw_config, where)
    config = _encoder_config(raw_config, folder, pooling, where)
    weights = SafetensorsFiles(folder)
    placements = _placements(config, weights)
    raw = _FirstPositions(weights, placements[_POSITIONS].raw_name, config.context_tokens)
    source = CheckpointSource(raw, placements, str(folder))
    used = source.raw_names
    refuse_leftovers(weights, weights.names(), used, HARMLESS_IN_BERT, str(folder), blocks=config.num_layers)
    tokenizer = load_tokenizer_files(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens; the model embeds {config.vocab_size}"
        )
    return EncoderCheckpoint(
        config=config,
        source=source,
        tokenizer=tokenizer,
        format="safetensors",
        name=path.resolve().name,
        path=path,
        weights_files=weights.files,
        licence=licence(path),
        warnings=(*weights.warnings, *_default_prompt(path)),
    )


def _default_prompt(path: Path) -> tuple[str, ...]:
    """A warning where sentence-transformers would put a text of the model's before every sentence."""
    file = path / "config_sentence_transformers.json"
    try:
        settings = read_json_object(file, _MAX_SETTINGS_BYTES, optional=True)
    except CheckpointError as error:
        return (f"{error}; it is left aside",)
    if not (name := settings.get("default_prompt_name")):
        return ()
    return (f"{file}: has a default prompt ({str(name)[:40]!r}), which is not put before sentences here",)


def _modules(path: Path) -> dict[str, str]:
    """Kind of module → its folder, from modules.json; empty for a plain BERT directory."""
    file = path / "modules.json"
    if not is_there(file):
        return {}
    modules: dict[str, str] = {}
    for module in read_json(file, list[_Module]):
        kind = module.type.rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize") or kind in modules:
            raise CheckpointError(
                f"{file}: module {kind[:80]!r} is not supported; allowed: Transformer, Pooling, Normalize"
            )
        if module.path and (Path(module.path).name != module.path or module.path == ".."):
            raise CheckpointError(f"{file}: module path {module.path[:80]!r} must be a folder beside it")
        modules[kind] = module.path
    if not {"Transformer", "Pooling"} <= set(modules):
        raise CheckpointError(f"{file}: must list a Transformer and a Pooling module")
    return modules


def _pooling(file: Path) -> Literal["mean", "cls"]:
    """The pooling mode, written the old way (`pooling_mode_*` flags) or the new (`pooling_mode`)."""
    settings = read_json(file, dict[str, Any])
    modes = settings.get("pooling_mode")
    if modes is None:
        flags = [key.removeprefix(_LEGACY_PREFIX) for key, on in settings.items() if on is True]
        modes = [_LEGACY_POOLING.get(flag, flag) for flag in flags if f"{_LEGACY_PREFIX}{flag}" in settings]
    listed = modes if isinstance(modes, list) else [modes]
    if len(listed) != 1 or not isinstance(listed[0], str) or listed[0] not in _POOLING_MODES:
        raise CheckpointError(f"{file}: pooling {str(modes)[:80]} is not supported; allowed: mean or cls")
    return _POOLING_MODES[listed[0]]


def _refuse_unsupported(raw: _BertConfig, where: str) -> None:
    checks: tuple[tuple[str, object, tuple[object, ...]], ...] = (
        ("model_type", raw.model_type, ("bert",)),
        ("hidden_act", raw.hidden_act, ("gelu",)),
        ("position_embedding_type", raw.position_embedding_type, ("absolute", None)),
        ("is_decoder", raw.is_decoder, (False,)),
        ("add_cross_attention", raw.add_cross_attention, (False,)),
        ("pruned_heads", raw.pruned_heads or {}, ({},)),
        ("quantization_config", raw.quantization_config, (None,)),
    )
    for field, found, allowed in checks:
        if found not in allowed:
            raise CheckpointError(f"{where}: {field} is {str(found)[:80]!r}; allowed is {allowed[0]!r}")


def _encoder_config(
    raw: _BertConfig, folder: Path, pooling: Literal["mean", "cls"] | None, where: str
) -> EncoderConfig:
    ranges = (
        ("vocab_size", raw.vocab_size, "vocab_size"),
        ("hidden_size", raw.hidden_size, "hidden_size"),
        ("num_hidden_layers", raw.num_hidden_layers, "num_layers"),
        ("num_attention_heads", raw.num_attention_heads, "num_heads"),
        ("intermediate_size", raw.intermediate_size, "ffn_width"),
        ("max_position_embeddings", raw.max_position_embeddings, "context_tokens"),
        ("type_vocab_size", raw.type_vocab_size, "num_layers"),
        ("layer_norm_eps", raw.layer_norm_eps, "norm_epsilon"),
    )
    for field, value, kind in ranges:
        check_range(where, field, value, kind)
    if raw.hidden_size % raw.num_attention_heads:
        raise CheckpointError(
            f"{where}: hidden_size {raw.hidden_size} is not a multiple of {raw.num_attention_heads} heads"
        )
    return EncoderConfig(
        family="bert",
        vocab_size=raw.vocab_size,
        hidden_size=raw.hidden_size,
        num_layers=raw.num_hidden_layers,
        num_heads=raw.num_attention_heads,
        ffn_width=raw.intermediate_size,
        norm_epsilon=raw.layer_norm_eps,
        context_tokens=_context_tokens(folder, raw.max_position_embeddings),
        token_types=raw.type_vocab_size,
        pooling=pooling or "mean",
    )


def _context_tokens(folder: Path, positions: int) -> int:
    """The longest input in tokens: `max_seq_length` of sentence-transformers, else every position."""
    file = folder / "sentence_bert_config.json"
    longest = read_json(file, _TransformerSettings).max_seq_length if is_there(file) else None
    if longest is None:
        return positions
    if longest < 3:  # [CLS], one token, [SEP]
        raise CheckpointError(f"{file}: max_seq_length is {longest}; allowed is 3 to {positions}")
    return min(longest, positions)


def _placements(config: EncoderConfig, files: SafetensorsFiles) -> dict[str, Placement]:
    word = f"{_EMBEDDING_PARTS['embed.word']}.weight"
    prefix = next((prefix for prefix in _PREFIXES if files.has(prefix + word)), None)
    if prefix is None:
        raise CheckpointError(f"{files.directory}: the tensor {word!r} is missing")
    placements = {}
    for name, shape in encoder_tensor_shapes(config).items():
        part, _, kind = name.rpartition(".")
        if part in _EMBEDDING_PARTS:
            stored = _EMBEDDING_PARTS[part]
        else:
            _, index, layer_part = part.split(".")
            stored = f"encoder.layer.{index}.{_LAYER_PARTS[layer_part]}"
        placements[name] = Placement(f"{prefix}{stored}.{kind}", shape)
    return placements
