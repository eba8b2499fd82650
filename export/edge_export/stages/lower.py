"""lower: graphs over the stored weights, in the operators that the board's runtime has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from edge_export.lower.decoder_onnx import GraphOptions, write_decoder_graph
from edge_export.lower.encoder_onnx import EncoderGraphOptions, write_encoder_graph
from edge_export.plan.encoder import EncoderPlan
from edge_export.plan.plan import ExportPlan
from edge_export.plan.target import BACKEND, MINIMUM_ONNXRUNTIME
from edge_export.stages.store import data_file, store_inputs
from edge_export.stages.values import Lowered, ModelKind, Run, Stored, extend, of
from edge_export.storage.decoder import StoredDecoder
from edge_export.storage.encoder import StoredEncoder
from edge_export.storage.stage_cache import Notes
from edge_reasoner.contract.bundle.manifest import DecoderSpec, EncoderSpec, Variant
from edge_reasoner.contract.profile.cost import peak_rss_bytes

#: MatMulNBits' accuracy levels: int8 dot products; float32
_FAST_LEVEL, _REFERENCE_LEVEL = 4, 1


@dataclass(frozen=True)
class _Row:
    """One graph to write: a variant's name, its file, and how it computes."""

    id: str
    graph: str
    level: int
    reference: bool


@dataclass(frozen=True)
class _Graphs:
    variants: tuple[Variant, ...]


def lower(run: Run, stored: Stored) -> Lowered:
    """Writes one graph for each way to compute, over the same weights: fastest first, the reference last."""
    graphs = run.cache.remember(
        "lower",
        lambda: lower_inputs(stored),
        _Graphs,
        lambda notes: _LOWER[stored.kind](run, stored, notes),
        folder=run.bundle,
        files=lambda made: [variant.graph for variant in made.variants],
    )
    return extend(Lowered, stored, spec=_SPEC[stored.kind](stored), variants=graphs.variants)


def lower_inputs(stored: Stored) -> tuple[Any, ...]:
    """What the graphs depend on."""
    return *store_inputs(stored), stored.cost, stored.board


def _decoder(run: Run, stored: Stored, notes: Notes) -> _Graphs:
    plan, weights = of(ExportPlan, stored.plan), of(StoredDecoder, stored.stored)
    quantized = any(unit.format is not None for unit in plan.units)
    rows = _rows(stored, quantized, ("cpu-int8-dot", "cpu-float32"))
    for row in rows:
        write_decoder_graph(
            run.bundle / row.graph,
            data_file(stored).removeprefix("graphs/"),
            stored.decoder.config,
            weights.weights,
            weights.ropes,
            GraphOptions(plan.opset, plan.context_tokens, plan.compute, row.level),
        )
    ram_bytes = peak_rss_bytes(stored.cost, stored.board)
    return _Graphs(tuple(_variant(row, plan.execution_provider, ram_bytes) for row in rows))


def _encoder(run: Run, stored: Stored, notes: Notes) -> _Graphs:
    plan, weights = of(EncoderPlan, stored.plan), of(StoredEncoder, stored.stored)
    quantized = plan.quantized
    name = f"{stored.role}-{plan.recipe}"
    rows = _rows(stored, quantized, (name, f"{name}-reference" if quantized else name))
    for row in rows:
        write_encoder_graph(
            run.bundle / row.graph,
            data_file(stored).removeprefix("graphs/"),
            stored.encoder.config,
            weights.weights,
            EncoderGraphOptions(plan.opset, row.level),
        )
    ram_bytes = peak_rss_bytes(stored.cost, stored.board, chunk_tokens=stored.context_tokens)
    return _Graphs(tuple(_variant(row, plan.execution_provider, ram_bytes) for row in rows))


def _rows(stored: Stored, quantized: bool, names: tuple[str, str]) -> list[_Row]:
    """A fast graph and a reference; of float weights the one graph is both."""
    if not quantized:
        return [_Row(names[1], f"graphs/{stored.role}.onnx", _REFERENCE_LEVEL, True)]
    return [
        _Row(names[0], f"graphs/{stored.role}.onnx", _FAST_LEVEL, False),
        _Row(names[1], f"graphs/{stored.role}.reference.onnx", _REFERENCE_LEVEL, True),
    ]


def _variant(row: _Row, execution_provider: str, ram_bytes: int) -> Variant:
    return Variant(
        id=row.id,
        backend=BACKEND,
        execution_provider=execution_provider,
        graph=row.graph,
        minimum_runtime=MINIMUM_ONNXRUNTIME,
        ram_floor_bytes=ram_bytes,
        reference=row.reference,
    )


def _decoder_spec(stored: Stored) -> DecoderSpec:
    checkpoint, tokenizer, plan = stored.decoder, stored.tokenizer, of(ExportPlan, stored.plan)
    config = checkpoint.config
    return DecoderSpec(
        family=config.family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        kv_heads=tuple(layer.num_kv_heads for layer in config.layers),
        head_dim=tuple(layer.head_dim for layer in config.layers),
        kv_dtype=plan.kv_dtype,
        context_tokens=plan.context_tokens,
        parameters=checkpoint.parameters,
        eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, *tokenizer.eos_token_ids))),
        bos_token_id=tokenizer.bos_token_id if tokenizer.add_bos else None,
    )


def _encoder_spec(stored: Stored) -> EncoderSpec:
    config = stored.encoder.config
    return EncoderSpec(
        family=config.family,
        vocab_size=config.vocab_size,
        dimension=config.hidden_size,
        context_tokens=config.context_tokens,
        parameters=stored.encoder.parameters,
        pooling=config.pooling,
    )


_LOWER: Final[Mapping[ModelKind, Callable[[Run, Stored, Notes], _Graphs]]] = MappingProxyType(
    {"decoder": _decoder, "encoder": _encoder}
)
_SPEC: Final[Mapping[ModelKind, Callable[[Stored], DecoderSpec | EncoderSpec]]] = MappingProxyType(
    {"decoder": _decoder_spec, "encoder": _encoder_spec}
)
