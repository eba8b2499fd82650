"""verify: every graph, opened on the device's own backend, must reproduce torch on the stored weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import msgspec

from edge_export.plan.encoder import EncoderPlan
from edge_export.plan.plan import ExportPlan
from edge_export.stages.lower import lower_inputs
from edge_export.stages.store import data_file, decoder_sequences
from edge_export.stages.values import Lowered, ModelKind, Run, Verified, extend, of
from edge_export.storage.decoder import StoredDecoder
from edge_export.storage.encoder import StoredEncoder
from edge_export.verify.decoder import decoder_golden, stored_head
from edge_export.verify.encoder import encoder_golden
from edge_export.verify.tolerance import FAST, device_tolerance
from edge_export.verify.variants import judge_decoder, judge_encoder
from edge_reasoner.contract.bundle.manifest import DecoderSpec, EncoderSpec, GoldenSet, Variant


@dataclass(frozen=True)
class _Verdict:
    variants: tuple[Variant, ...]
    golden: GoldenSet
    warnings: tuple[str, ...] = ()


def verify(run: Run, lowered: Lowered) -> Verified:
    """Keeps the variants that are exact enough. Raises VerificationError where the reference is not."""
    verdict = run.cache.remember(
        "verify", lambda: verify_inputs(lowered), _Verdict, lambda notes: _VERIFY[lowered.kind](run, lowered)
    )
    kept = {variant.graph for variant in verdict.variants}
    for variant in lowered.variants:
        if variant.graph not in kept:
            (run.bundle / variant.graph).unlink()
    return extend(
        Verified,
        lowered,
        variants=verdict.variants,
        golden=verdict.golden,
        warnings=(*lowered.warnings, *verdict.warnings),
    )


def verify_inputs(lowered: Lowered) -> tuple[Any, ...]:
    """What the verdict depends on."""
    return *lower_inputs(lowered), lowered.spec, lowered.options.threads, _golden_texts(lowered)


def _decoder(run: Run, lowered: Lowered) -> _Verdict:
    config, recipe = lowered.decoder.config, of(ExportPlan, lowered.plan).recipe
    stored, sequences = of(StoredDecoder, lowered.stored), decoder_sequences(lowered)
    head = stored_head(config, run.bundle / data_file(lowered), stored)
    states = stored.expected_states[: len(sequences)]
    golden = decoder_golden(config, sequences, states, head, FAST[recipe])
    spec, threads = of(DecoderSpec, lowered.spec), lowered.options.threads
    kept, warnings, error = judge_decoder(run.bundle, spec, lowered.variants, golden, threads, run.progress)
    golden = msgspec.structs.replace(golden, tolerance=device_tolerance(recipe, error))
    return _Verdict(kept, golden, warnings)


def _encoder(run: Run, lowered: Lowered) -> _Verdict:
    data, tolerance = run.bundle / data_file(lowered), of(EncoderPlan, lowered.plan).cosine_tolerance
    golden = encoder_golden(lowered.encoder, data, of(StoredEncoder, lowered.stored), tolerance)
    spec, threads = of(EncoderSpec, lowered.spec), lowered.options.threads
    judge_encoder(run.bundle, spec, lowered.variants, golden, threads, run.progress)
    return _Verdict(lowered.variants, golden)


def _golden_texts(lowered: Lowered) -> bytes | None:
    """The tokenizer decides what an encoder's golden texts are; a decoder's are tokens already."""
    return lowered.tokenizer.tokenizer_json if lowered.kind == "encoder" else None


_VERIFY: Final[Mapping[ModelKind, Callable[[Run, Lowered], _Verdict]]] = MappingProxyType(
    {"decoder": _decoder, "encoder": _encoder}
)
