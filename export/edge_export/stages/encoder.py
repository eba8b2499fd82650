"""The encoder's way through the exporter: quantize and lower, golden vectors, quality.

    load_encoder → lower_encoder → (edge_reasoner opens the graph) → encoder_golden, encoder_quality

Weights are read, quantized and written one matrix at a time. Golden vectors and quality hold the whole
encoder in memory once (encoders are small).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from tokenizers import Tokenizer

from edge_export.checkpoint.bert import EncoderCheckpoint
from edge_export.lower.encoder_onnx import EncoderGraphOptions, encoder_contrib_ops, write_encoder_graph
from edge_export.model.config import EncoderConfig, TensorSource
from edge_export.model.encoder import Encoder
from edge_export.plan.encoder_formats import (
    EncoderFormats,
    EncoderRecipe,
    MatrixFormat,
    encoder_formats,
    encoder_weights,
)
from edge_export.progress import Progress
from edge_export.quantize import QUANTIZERS, BlockFormat, BlockQuantized
from edge_export.storage.external_data import ExternalData
from edge_export.storage.matrices import StoredMatrix, store_blocks, store_dense
from edge_reasoner.backends.base import EncoderSession
from edge_reasoner.contract.bundle.manifest import (
    ComponentKind,
    EncoderGolden,
    EncoderSpec,
    GoldenSet,
    Variant,
)
from edge_reasoner.contract.profile.cost import GraphCost, peak_rss_bytes
from edge_reasoner.contract.profile.schema import DeviceProfile
from edge_reasoner.errors import InputError, TargetError

#: The oldest onnxruntime that the graphs have been run on.
MINIMUM_ONNXRUNTIME: Final = "1.23.2"
#: How far, in 1 − cosine, a kernel may be from torch on the same stored weights. The float recipes and every
#: reference graph are bound by rounding; accuracy level 4 also rounds each matrix's inputs to 8 bits.
GOLDEN_TOLERANCE: Final[Mapping[EncoderRecipe, float]] = MappingProxyType(
    {"fp32": 1e-5, "fp16": 1e-5, "int8": 5e-3, "mixed": 5e-3, "int4": 5e-3}
)
#: Peak resident bytes per stored float16 byte: widened at load, packed, then partly freed. Measured with
#: MiniLM: 4.9 on onnxruntime 1.23.2, 2.7 on 1.31.1.
_FLOAT16_RESIDENT_RATIO: Final = 5.0
#: `Shape` with bounds
_MINIMUM_OPSET: Final = 15
_FAST_LEVEL, _REFERENCE_LEVEL = 4, 1
_BATCH_TEXTS = 16
_MAX_GOLDEN_TOKENS = 128
_GOLDEN_TEXTS: Final = (
    "Where is the key?",
    "The train to the coast leaves at 9:40 from platform 12, not from platform 3 as announced.",
    "Ein größerer Speicher hilft nicht immer. 你好，世界！ It depends on what the program does with it, how "
    "often it reads the same bytes again, and whether the next request is already waiting in the queue.",
)


@dataclass(frozen=True)
class LoweredEncoder:
    """What `lower_encoder` wrote. Paths in `variants` and `files` are relative to the bundle's folder."""

    kind: ComponentKind
    recipe: EncoderRecipe
    spec: EncoderSpec
    #: fastest first, the reference last
    variants: tuple[Variant, ...]
    #: every file written: the graphs, then their common weights
    files: tuple[str, ...]
    #: one JSON object per weight matrix: name, rows, columns, format, bytes, relative_rms_error
    plan: tuple[Mapping[str, Any], ...]
    #: all weights with scales, as stored (without alignment gaps)
    weight_bytes: int
    cost: GraphCost


class StoredSource:
    """A `TensorSource` that shows another's tensors as a recipe stores them: rounded or dequantized."""

    def __init__(self, source: TensorSource, formats: EncoderFormats) -> None:
        self._source, self._formats = source, formats

    def names(self) -> Iterator[str]:
        """See `TensorSource.names`."""
        return self._source.names()

    def get(self, name: str) -> torch.Tensor:
        """See `TensorSource.get`."""
        return _as_stored(self._source.get(name), self._formats.of(name))

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `TensorSource.rows`. Blocks lie within a row, so a part of the rows is stored as all are."""
        return _as_stored(self._source.rows(name, start, stop), self._formats.of(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource.shape`."""
        return self._source.shape(name)


def lower_encoder(
    checkpoint: EncoderCheckpoint,
    recipe: str,
    profile: DeviceProfile,
    folder: Path,
    progress: Progress,
    kind: ComponentKind = "preprocessor",
) -> LoweredEncoder:
    """Writes `graphs/<kind>.onnx` and its weights `graphs/<kind>.data` under `folder`.

    For int8, mixed and int4 also `graphs/<kind>.reference.onnx`: float32 arithmetic on the same weights. The
    float recipes' one graph is that already.

    Raises InputError for an unknown recipe, TargetError where the board's onnxruntime lacks an operator,
    CheckpointError where a weight is corrupt.
    """
    config = checkpoint.config
    formats = encoder_formats(config, recipe)
    quantized = any(isinstance(fmt, BlockFormat) for fmt in formats.matrices.values())
    _require_target(encoder_contrib_ops(quantized), profile)
    graphs = folder / "graphs"
    graphs.mkdir(parents=True, exist_ok=True)
    data_file = f"{kind}.data"
    stored, plan = _store_weights(checkpoint, formats, graphs / data_file, progress)
    levels = {f"graphs/{kind}.onnx": _FAST_LEVEL}
    if quantized:
        levels[f"graphs/{kind}.reference.onnx"] = _REFERENCE_LEVEL
    for path, level in levels.items():
        options = EncoderGraphOptions(profile.max_opset, level)
        write_encoder_graph(folder / path, data_file, config, stored, options)
    cost = _cost(config, formats.recipe, stored)
    ram_bytes = peak_rss_bytes(cost, profile, chunk_tokens=config.context_tokens)
    return LoweredEncoder(
        kind=kind,
        recipe=formats.recipe,
        spec=encoder_spec(checkpoint),
        variants=tuple(_variant(kind, formats.recipe, path, ram_bytes) for path in levels),
        files=(*levels, f"graphs/{data_file}"),
        plan=plan,
        weight_bytes=cost.total_weight_bytes,
        cost=cost,
    )


def encoder_spec(checkpoint: EncoderCheckpoint) -> EncoderSpec:
    """The manifest's description of the encoder."""
    config = checkpoint.config
    return EncoderSpec(
        family=config.family,
        vocab_size=config.vocab_size,
        dimension=config.hidden_size,
        context_tokens=config.context_tokens,
        parameters=checkpoint.parameters,
        pooling=config.pooling,
    )


def encoder_golden(
    checkpoint: EncoderCheckpoint, recipe: str, texts: Sequence[str] = _GOLDEN_TEXTS
) -> GoldenSet:
    """Embeddings of `texts` (cut to 128 tokens) by torch on the weights that `recipe` stores.

    Raises InputError for an unknown recipe or without texts.
    """
    formats = encoder_formats(checkpoint.config, recipe)
    encoder = Encoder.from_source(checkpoint.config, StoredSource(checkpoint.source, formats))
    token_ids = _tokenize(checkpoint, texts, _MAX_GOLDEN_TOKENS)
    expected = embed_with_torch(encoder, token_ids)
    vectors = tuple(
        EncoderGolden(token_ids=tuple(ids), embedding=tuple(row.tolist()))
        for ids, row in zip(token_ids, expected, strict=True)
    )
    return GoldenSet(schema_version=1, tolerance=GOLDEN_TOLERANCE[formats.recipe], encoder=vectors)


def encoder_quality(
    checkpoint: EncoderCheckpoint, session: EncoderSession, sentences: Sequence[str]
) -> dict[str, float]:
    """Cosines between a session's embeddings and the checkpoint's own in float32 torch, on `sentences`.

    Returns mean_cosine, mean_cosine_stderr (standard error of the mean; 0 for one sentence), min_cosine and
    sentences (their number). Raises InputError without sentences.
    """
    token_ids = _tokenize(checkpoint, sentences, checkpoint.config.context_tokens)
    expected = embed_with_torch(Encoder.from_source(checkpoint.config, checkpoint.source), token_ids)
    got = torch.from_numpy(session.embed(token_ids))
    cosines = torch.nn.functional.cosine_similarity(got.double(), expected.double(), dim=-1)
    count = len(cosines)
    spread = float(cosines.std()) if count > 1 else 0.0
    return {
        "mean_cosine": float(cosines.mean()),
        "mean_cosine_stderr": spread / math.sqrt(count),
        "min_cosine": float(cosines.min()),
        "sentences": float(count),
    }


def embed_with_torch(encoder: Encoder, token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """float32 [n, hidden] for n token id lists, in their order; inputs of like length run together."""
    order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
    result = torch.empty(len(token_ids), encoder.config.hidden_size)
    for start in range(0, len(order), _BATCH_TEXTS):
        group = order[start : start + _BATCH_TEXTS]
        width = max(len(token_ids[index]) for index in group)
        ids, mask = torch.zeros(2, len(group), width, dtype=torch.int64)
        for row, index in enumerate(group):
            ids[row, : len(token_ids[index])] = torch.tensor(token_ids[index], dtype=torch.int64)
            mask[row, : len(token_ids[index])] = 1
        with torch.inference_mode():
            result[group] = encoder(ids, mask)
    return result


def _tokenize(checkpoint: EncoderCheckpoint, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids with special tokens; a long text loses its end, not its closing token."""
    if not texts:
        raise InputError("an encoder is checked on at least one sentence; none was given")
    tokenizer = Tokenizer.from_str(checkpoint.tokenizer.tokenizer_json.decode("utf-8"))
    tokenizer.enable_truncation(min(max_tokens, checkpoint.config.context_tokens))
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def _require_target(needed: frozenset[str], profile: DeviceProfile) -> None:
    allowed = profile.allowed_ops
    if allowed is not None and (lacking := sorted(needed - allowed)):
        raise TargetError(
            f"profile {profile.name!r}: its onnxruntime lacks {', '.join(lacking)}, which an encoder needs"
        )
    if profile.max_opset < _MINIMUM_OPSET:
        raise TargetError(
            f"profile {profile.name!r}: export_opset {profile.max_opset}; an encoder needs {_MINIMUM_OPSET}"
        )


def _quantize(weight: torch.Tensor, fmt: BlockFormat) -> BlockQuantized:
    # Searching for scales pays at 4 bits; at 8 the rounding is far below what anything downstream can see.
    return QUANTIZERS["searched" if fmt.bits == 4 else "rtn"].quantize(weight, fmt)


def _as_stored(weight: torch.Tensor, fmt: MatrixFormat) -> torch.Tensor:
    if isinstance(fmt, BlockFormat):
        return _quantize(weight, fmt).dequantize()
    limit = torch.finfo(torch.float16).max
    return weight.clamp(-limit, limit).to(torch.float16).float() if fmt == "float16" else weight


def _store_weights(
    checkpoint: EncoderCheckpoint, formats: EncoderFormats, path: Path, progress: Progress
) -> tuple[dict[str, StoredMatrix], tuple[Mapping[str, Any], ...]]:
    """Writes every weight: where each lies, and the plan's record of each matrix."""
    stored: dict[str, StoredMatrix] = {}
    plan: list[Mapping[str, Any]] = []
    weights = list(encoder_weights(checkpoint.config))
    with ExternalData(path) as data:
        for index, (name, parts) in enumerate(weights):
            progress("quantizing the encoder", index, len(weights))
            tensor = torch.cat([checkpoint.source.get(part) for part in parts])
            fmt = formats.of(name)
            if isinstance(fmt, BlockFormat):
                quantized = _quantize(tensor, fmt)
                stored[name], kept = store_blocks(data, quantized), quantized.dequantize()
            else:
                stored[name], kept = store_dense(data, tensor, fmt), _as_stored(tensor, fmt)
            if tensor.ndim == 2:
                plan.append(_plan_record(name, tensor, kept, stored[name], fmt))
    progress("quantizing the encoder", len(weights), len(weights))
    return stored, tuple(plan)


def _plan_record(
    name: str, exact: torch.Tensor, kept: torch.Tensor, stored: StoredMatrix, fmt: MatrixFormat
) -> Mapping[str, Any]:
    size = float(exact.norm())
    return {
        "name": name.removesuffix(".weight"),
        "rows": exact.shape[0],
        "columns": exact.shape[1],
        "format": fmt.label if isinstance(fmt, BlockFormat) else fmt,
        "bytes": stored.size_bytes,
        "relative_rms_error": float((kept - exact).norm()) / size if size > 0 else 0.0,
    }


def _cost(config: EncoderConfig, recipe: EncoderRecipe, stored: Mapping[str, StoredMatrix]) -> GraphCost:
    hidden, ffn, layers = config.hidden_size, config.ffn_width, config.num_layers
    total = sum(weight.size_bytes for weight in stored.values())
    # The widest moment of a layer: the feed-forward's input and its values before and after GELU, or the
    # packed and the split q, k, v beside the residual and one row of attention weights for each head.
    streamed = total - stored["embed.word.weight"].size_bytes
    widest = max(hidden + 2 * ffn, 8 * hidden + config.num_heads * config.context_tokens)
    return GraphCost(
        total_weight_bytes=total,
        streamed_weight_bytes=streamed,
        linear_macs_per_token=layers * (4 * hidden * hidden + 2 * hidden * ffn),
        attention_macs_per_pair=layers * 2 * hidden,
        context_tokens=config.context_tokens,
        activation_bytes_per_token=4 * widest,
        arithmetic="float32" if recipe in ("fp32", "fp16") else "int8",
        # The file stays mapped; matrices are kept a second time as the kernels want them.
        prepack_ratio=_FLOAT16_RESIDENT_RATIO if recipe == "fp16" else 1 + streamed / total,
    )


def _variant(kind: str, recipe: str, path: str, ram_bytes: int) -> Variant:
    reference = path.endswith(".reference.onnx")
    return Variant(
        id=f"{kind}-{recipe}{'-reference' if reference else ''}",
        backend="onnxruntime",
        execution_provider="CPUExecutionProvider",
        graph=path,
        minimum_runtime=MINIMUM_ONNXRUNTIME,
        ram_floor_bytes=ram_bytes,
        reference=reference,
    )
