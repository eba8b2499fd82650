"""The decoder's way through the exporter.

    load_checkpoint → analyse + plan_decoder → store_decoder + write_decoder_graph → verify on the device
    backend → golden vectors, quality

Weights are never all in memory: see `lower/decoder_weights.py`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import torch

from edge_export.checkpoint.load import DecoderCheckpoint
from edge_export.lower.decoder_onnx import GraphOptions, write_decoder_graph
from edge_export.model.config import DecoderConfig
from edge_export.plan.analysis import Analysis, analyse_importance, analyse_losses
from edge_export.plan.plan import (
    ExportPlan,
    Recipe,
    check_decoder,
    int4_format,
    needs_importance,
    needs_losses,
    plan_decoder,
)
from edge_export.progress import Progress
from edge_export.quantize.rtn import SearchedScale
from edge_export.stages.store_decoder import store_decoder
from edge_export.storage.decoder import StoredDecoder
from edge_export.storage.external_data import ExternalData
from edge_export.verify.decoder import (
    Quality,
    decoder_golden,
    golden_sequences,
    measure_quality,
    original_head,
    stored_head,
)
from edge_export.verify.tolerance import EXACT, FAST, device_tolerance
from edge_reasoner.backends.base import DecoderSession
from edge_reasoner.backends.golden import Trial, try_decoder
from edge_reasoner.backends.onnxruntime_backend import OrtDecoderSession
from edge_reasoner.contract.bundle.manifest import DecoderSpec, GoldenSet, Variant
from edge_reasoner.contract.profile.cost import GraphCost, peak_rss_bytes, require_fit
from edge_reasoner.contract.profile.schema import DeviceProfile
from edge_reasoner.errors import VerificationError

Batches = Sequence[torch.Tensor]

#: The oldest onnxruntime that the graphs have been run on.
MINIMUM_ONNXRUNTIME: Final = "1.23.2"
_FAST_LEVEL, _REFERENCE_LEVEL = 4, 1
_CPU: Final = "CPUExecutionProvider"
_SEED: Final = 0
#: Scales tried per block where a quantizer only serves to estimate a loss.
_ROUGH_CANDIDATES: Final = 5
_KIND: Final = "reasoner"


@dataclass(frozen=True)
class Texts:
    """Token ids int64 [T] of the texts that an export reads."""

    calibration: tuple[torch.Tensor, ...]
    calibration_sha256: str
    quality: tuple[torch.Tensor, ...]
    quality_name: str


@dataclass(frozen=True)
class PlannedDecoder:
    """A plan, what was learnt for it, and what it will cost on the board."""

    plan: ExportPlan
    head_analysis: Analysis | None
    cost: GraphCost


@dataclass(frozen=True)
class ExportedDecoder:
    """What was written under the bundle's folder, verified. Paths are relative to it."""

    spec: DecoderSpec
    #: fastest first, the reference last
    variants: tuple[Variant, ...]
    files: tuple[str, ...]
    golden: GoldenSet
    quality: Quality
    warnings: tuple[str, ...]


def plan_stage(
    checkpoint: DecoderCheckpoint,
    profile: DeviceProfile,
    recipe: Recipe,
    quantizer: str,
    context_tokens: int | None,
    texts: Texts,
    progress: Progress,
) -> PlannedDecoder:
    """Analyses as the recipe needs it, plans, and refuses what cannot fit. No weight has changed yet.

    Raises InputError, TargetError or CheckpointError.
    """
    config = checkpoint.config
    context = check_decoder(config, profile, recipe, context_tokens)
    smallest = plan_decoder(config, profile, "int4" if recipe == "auto" else recipe, context, None, None)
    require_fit(_cost(config, smallest), profile)
    analysis: Analysis | None = None
    if needs_losses(recipe):
        # The backward pass, which costs most, sees half of each text: an order needs less than GPTQ does.
        halves = [tokens[: max(2, len(tokens) // 2)] for tokens in texts.calibration]
        rough = SearchedScale(_ROUGH_CANDIDATES)
        analysis = analyse_losses(
            config, checkpoint.source, halves, rough, int4_format(profile), _SEED, progress
        )
    elif needs_importance(recipe) and quantizer != "rtn":
        analysis = analyse_importance(config, checkpoint.source, texts.calibration, progress)
    plan = plan_decoder(config, profile, recipe, context, analysis, texts.calibration_sha256, quantizer)
    cost = _cost(config, plan)
    require_fit(cost, profile)
    return PlannedDecoder(plan, analysis, cost)


def export_stage(
    checkpoint: DecoderCheckpoint,
    planned: PlannedDecoder,
    profile: DeviceProfile,
    bos_token_id: int | None,
    eos_token_ids: tuple[int, ...],
    texts: Texts,
    folder: Path,
    threads: int,
    progress: Progress,
) -> ExportedDecoder:
    """Quantizes, writes graphs and weights under `folder/graphs`, verifies them, measures quality.

    Raises VerificationError where a graph does not reproduce torch on the stored weights.
    """
    config, plan = checkpoint.config, planned.plan
    graphs = folder / "graphs"
    graphs.mkdir(parents=True, exist_ok=True)
    sequences = golden_sequences(config, texts.quality, plan.context_tokens)
    checks = [*sequences, *texts.quality]
    with ExternalData(graphs / f"{_KIND}.data") as data:
        analysis = planned.head_analysis
        head_inputs = None if analysis is None else analysis.head_inputs
        stored = store_decoder(
            data, config, checkpoint.source, plan, head_inputs, texts.calibration, checks, progress
        )
    variants = _write_graphs(graphs, config, plan, stored, planned.cost, profile)
    spec = _spec(checkpoint, plan, bos_token_id, eos_token_ids)
    head = stored_head(config, graphs / f"{_KIND}.data", stored)
    golden = decoder_golden(
        config, sequences, stored.expected_states[: len(sequences)], head, FAST[plan.recipe]
    )
    variants, warnings, error = _verify(folder, spec, variants, golden, threads, progress)
    golden = msgspec.structs.replace(golden, tolerance=device_tolerance(plan.recipe, error))
    with _open(folder, spec, variants[0], threads) as session:
        original_states = stored.original_states[len(sequences) :]
        quality = measure_quality(
            config,
            session,
            texts.quality,
            original_states,
            original_head(config, checkpoint.source),
            progress,
        )
    files = sorted({variant.graph for variant in variants} | {f"graphs/{_KIND}.data"})
    for unused in sorted(p for p in graphs.glob("*.onnx") if f"graphs/{p.name}" not in files):
        unused.unlink()
    return ExportedDecoder(spec, variants, tuple(files), golden, quality, warnings)


def _write_graphs(
    graphs: Path,
    config: DecoderConfig,
    plan: ExportPlan,
    stored: StoredDecoder,
    cost: GraphCost,
    profile: DeviceProfile,
) -> tuple[Variant, ...]:
    """One graph per accuracy level over the same weights; float recipes need one only."""
    quantized = any(unit.format is not None for unit in plan.units)
    rows = [("cpu-int8-dot", f"{_KIND}.onnx", _FAST_LEVEL, False)] if quantized else []
    reference_file = f"{_KIND}.reference.onnx" if quantized else f"{_KIND}.onnx"
    rows.append(("cpu-float32", reference_file, _REFERENCE_LEVEL, True))
    variants = []
    for name, file, level, reference in rows:
        options = GraphOptions(plan.opset, plan.context_tokens, plan.compute, level)
        write_decoder_graph(graphs / file, f"{_KIND}.data", config, stored.weights, stored.ropes, options)
        variants.append(
            Variant(
                id=name,
                backend="onnxruntime",
                execution_provider=_CPU,
                graph=f"graphs/{file}",
                minimum_runtime=MINIMUM_ONNXRUNTIME,
                ram_floor_bytes=peak_rss_bytes(cost, profile),
                reference=reference,
            )
        )
    return tuple(variants)


def _verify(
    folder: Path,
    spec: DecoderSpec,
    variants: Sequence[Variant],
    golden: GoldenSet,
    threads: int,
    progress: Progress,
) -> tuple[tuple[Variant, ...], tuple[str, ...], float]:
    """The variants that reproduce torch, a warning for one that does not, and the largest error of the kept.

    The reference must be exact; a fast variant beyond its tolerance is left out, for it would be wrong on the
    device too.
    """
    kept, warnings, error = [], [], 0.0
    for number, variant in enumerate(variants):
        progress("verifying on the device backend", number, len(variants))
        trial = _trial(folder, spec, variant, golden, threads)
        exact = FAST["fp16"] if spec.kv_dtype == "float16" else EXACT
        if variant.reference and (trial.error > max(exact, _float_tolerance(golden)) or trial.problem):
            raise VerificationError(
                f"{variant.graph}: does not reproduce torch on the stored weights: relative error "
                f"{trial.error:.3g}, allowed {exact:g} {trial.problem}".rstrip()
            )
        if trial.problem:
            warnings.append(f"{variant.id}: left out, its kernels are too inexact here: {trial.problem}")
        else:
            kept.append(variant)
            error = max(error, trial.error)
    return tuple(kept), tuple(warnings), error


def _float_tolerance(golden: GoldenSet) -> float:
    """fp16 weights are widened exactly, so only a float16 graph may deviate by more than rounding."""
    return golden.tolerance if golden.tolerance < FAST["fp16"] else 0.0


def _trial(folder: Path, spec: DecoderSpec, variant: Variant, golden: GoldenSet, threads: int) -> Trial:
    with _open(folder, spec, variant, threads) as session:
        return try_decoder(session, golden, time.perf_counter)


@contextmanager
def _open(folder: Path, spec: DecoderSpec, variant: Variant, threads: int) -> Iterator[DecoderSession]:
    session = OrtDecoderSession(
        folder / variant.graph,
        spec,
        provider=variant.execution_provider,
        session_options=variant.session_options,
        threads=threads,
        context_tokens=None,
    )
    try:
        yield session
    finally:
        session.close()


def _spec(
    checkpoint: DecoderCheckpoint, plan: ExportPlan, bos_token_id: int | None, eos_token_ids: tuple[int, ...]
) -> DecoderSpec:
    config = checkpoint.config
    return DecoderSpec(
        family=config.family,
        vocab_size=config.vocab_size,
        kv_heads=tuple(layer.num_kv_heads for layer in config.layers),
        head_dim=tuple(layer.head_dim for layer in config.layers),
        kv_dtype=plan.compute,
        context_tokens=plan.context_tokens,
        parameters=checkpoint.parameters,
        eos_token_ids=eos_token_ids,
        bos_token_id=bos_token_id,
    )


def _cost(config: DecoderConfig, plan: ExportPlan) -> GraphCost:
    """The plan in the cost model's terms."""
    layer_parameters = sum(u.unit.parameters for u in plan.units if u.unit.layer is not None)
    gathered = sum(plan.unit_bytes(u) for u in plan.units if u.unit.kind == "embed")
    width = 2 if plan.compute == "float16" else 4
    quantized = any(u.format is not None for u in plan.units)
    return GraphCost(
        total_weight_bytes=plan.weight_bytes,
        streamed_weight_bytes=plan.weight_bytes - gathered,
        linear_macs_per_token=layer_parameters,
        head_macs=config.hidden_size * config.vocab_size,
        attention_macs_per_pair=sum(2 * layer.num_heads * layer.head_dim for layer in config.layers),
        kv_bytes_per_token=sum(2 * layer.num_kv_heads * layer.head_dim * width for layer in config.layers),
        context_tokens=plan.context_tokens,
        activation_bytes_per_token=4 * (8 * config.hidden_size + 3 * max(x.ffn_width for x in config.layers)),
        arithmetic="int8" if quantized else plan.compute,
    )
