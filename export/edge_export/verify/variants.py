"""Variants on the device's own backend: opened, tried with golden vectors, kept or refused."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path

from edge_export.progress import Progress
from edge_export.verify.tolerance import EXACT, FAST
from edge_reasoner.backends import load_backend
from edge_reasoner.backends.base import DecoderModel, EncoderModel, OpenOptions
from edge_reasoner.backends.golden import try_decoder, try_encoder
from edge_reasoner.contract.bundle.manifest import DecoderSpec, EncoderSpec, GoldenSet, Variant
from edge_reasoner.errors import VerificationError


def open_decoder(
    folder: Path, spec: DecoderSpec, variant: Variant, threads: int
) -> AbstractContextManager[DecoderModel]:
    """A variant of the bundle in `folder`."""
    backend = load_backend(variant.backend)
    return closing(backend.open_decoder(folder / variant.graph, spec, **_options(variant, threads)))


def open_encoder(
    folder: Path, spec: EncoderSpec, variant: Variant, threads: int
) -> AbstractContextManager[EncoderModel]:
    """A variant of the bundle in `folder`."""
    backend = load_backend(variant.backend)
    return closing(backend.open_encoder(folder / variant.graph, spec, **_options(variant, threads)))


def _options(variant: Variant, threads: int) -> OpenOptions:
    return {
        "provider": variant.execution_provider,
        "session_options": variant.session_options,
        "threads": threads,
    }


def judge_decoder(
    folder: Path,
    spec: DecoderSpec,
    variants: Sequence[Variant],
    golden: GoldenSet,
    threads: int,
    progress: Progress,
) -> tuple[tuple[Variant, ...], tuple[str, ...], float]:
    """The variants that reproduce torch, a warning for one that does not, and the largest error of the kept.

    The reference must be exact, else VerificationError; a fast variant beyond its tolerance is left out, for
    it would be wrong on the device too.
    """
    kept, warnings, error = [], [], 0.0
    for number, variant in enumerate(variants):
        progress("verifying on the device backend", number, len(variants))
        with open_decoder(folder, spec, variant, threads) as model:
            trial = try_decoder(model, golden, time.perf_counter)
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


def judge_encoder(
    folder: Path,
    spec: EncoderSpec,
    variants: Sequence[Variant],
    golden: GoldenSet,
    threads: int,
    progress: Progress,
) -> None:
    """Raises VerificationError unless every variant reproduces torch."""
    for number, variant in enumerate(variants):
        progress("verifying the encoder", number, len(variants))
        with open_encoder(folder, spec, variant, threads) as model:
            trial = try_encoder(model, golden, time.perf_counter)
        if trial.problem:
            raise VerificationError(f"{variant.graph}: does not reproduce torch: {trial.problem}")


def _float_tolerance(golden: GoldenSet) -> float:
    """fp16 weights are widened exactly, so only a float16 graph may deviate by more than rounding."""
    return golden.tolerance if golden.tolerance < FAST["fp16"] else 0.0
