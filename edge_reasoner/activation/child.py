"""One candidate, tried in a child process: what `trials` asks for, and what runs there.

The child gets the bundle's folder as an open descriptor and what the parent has checked in it, so that it
tries the very files that the parent would open.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, cast

import msgspec
from msgspec import Meta

from edge_reasoner.activation.choice import Candidate
from edge_reasoner.backends import load_backend
from edge_reasoner.backends.base import Backend, DecoderModel, EncoderModel, OpenOptions
from edge_reasoner.backends.golden import Clock, Trial, check_golden, try_decoder, try_encoder
from edge_reasoner.contract.bundle.held import HeldFolder, Identity
from edge_reasoner.contract.bundle.manifest import (
    MANIFEST_NAME,
    MAX_GOLDEN_BYTES,
    MAX_MANIFEST_BYTES,
    Component,
    DecoderSpec,
    GoldenSet,
    Variant,
    parse_golden,
    parse_manifest,
)
from edge_reasoner.contract.bundle.open import Bundle
from edge_reasoner.errors import BackendError, BundleError, EdgeReasonerError, one_line
from edge_reasoner.machine.confined import Limits, enter, say

_MOST_MS = 1e9


class TrialRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Try this candidate of this component of the bundle whose folder is open as `descriptor`."""

    limits: Limits
    #: the bundle's folder, to be shown
    root: str
    descriptor: int
    bundle_id: str
    kind: str
    candidate: Candidate
    threads: int
    #: of the candidate's graph: path -> identity of each file of weights
    weights: dict[str, Identity]


class TrialAnswer(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What `Trial` says, `error` None where it is not finite; or `failure`, one line, and nothing else."""

    failure: Annotated[str, Meta(max_length=1000)] = ""
    error: Annotated[float, Meta(ge=0)] | None = None
    problem: Annotated[str, Meta(max_length=1000)] = ""
    step_ms: Annotated[float, Meta(ge=0, le=_MOST_MS)] | None = None

    def trial(self) -> Trial:
        """The trial that it tells of. Raises BackendError where it failed."""
        if self.failure:
            raise BackendError(one_line(self.failure))
        error = math.inf if self.error is None else self.error
        return Trial(error, one_line(self.problem), self.step_ms)


def read_golden(bundle: Bundle, component: Component) -> GoldenSet:
    """The component's golden vectors, within bounds. Raises BundleError."""
    golden = parse_golden(bundle.read_bytes(component.golden, MAX_GOLDEN_BYTES), component.golden)
    check_golden(golden, component.spec, component.golden)
    return golden


def variant_of(component: Component, variant_id: str) -> Variant:
    """The variant of that id. Raises BundleError."""
    for variant in component.variants:
        if variant.id == variant_id:
            return variant
    raise BundleError(f"component {component.kind!r} has no variant {variant_id!r}")


def open_candidate(
    bundle: Bundle, component: Component, backend: Backend, candidate: Candidate, threads: int
) -> DecoderModel | EncoderModel:
    """Opens one candidate's model. Raises BundleError, BackendError."""
    variant = variant_of(component, candidate.variant_id)
    graph = bundle.graph(variant.graph)
    options: OpenOptions = {
        "provider": variant.execution_provider,
        "session_options": candidate.session_options,
        "threads": threads,
    }
    if isinstance(component.spec, DecoderSpec):
        return backend.open_decoder(graph, component.spec, **options)
    return backend.open_encoder(graph, component.spec, **options)


def run_trial(model: DecoderModel | EncoderModel, golden: GoldenSet, clock: Clock) -> Trial:
    """Runs the golden vectors. Raises BackendError."""
    if golden.decoder:
        return try_decoder(cast(DecoderModel, model), golden, clock)
    return try_encoder(cast(EncoderModel, model), golden, clock)


def main(answer: int, parent: int, request: str) -> None:
    """What the child does; does not return."""
    asked = msgspec.json.decode(request, type=TrialRequest)
    enter(asked.limits, answer, parent)
    try:
        trial = _try(asked)
        said = TrialAnswer(
            error=max(0.0, trial.error) if math.isfinite(trial.error) else None,
            problem=one_line(trial.problem),
            step_ms=None if trial.step_ms is None else min(max(0.0, trial.step_ms), _MOST_MS),
        )
    except EdgeReasonerError as error:
        said = TrialAnswer(failure=one_line(error))
    except MemoryError:
        said = TrialAnswer(failure="no memory is left within what it may take")
    say(answer, msgspec.json.encode(said))


def _try(asked: TrialRequest) -> Trial:
    folder = HeldFolder(Path(asked.root), asked.descriptor)
    manifest = parse_manifest(folder.read(MANIFEST_NAME, MAX_MANIFEST_BYTES))
    if manifest.bundle_id != asked.bundle_id:
        raise BundleError(f"{MANIFEST_NAME}: changed since the bundle was opened; open the bundle again")
    component = next(part for part in manifest.components if part.kind == asked.kind)
    variant = variant_of(component, asked.candidate.variant_id)
    bundle = Bundle(folder.path, manifest, folder, asked.weights, {variant.graph: tuple(asked.weights)})
    golden = read_golden(bundle, component)
    backend = load_backend(variant.backend)
    model = open_candidate(bundle, component, backend, asked.candidate, asked.threads)
    return run_trial(model, golden, time.perf_counter)
