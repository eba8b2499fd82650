"""Opens a component of a bundle on this machine, in the variant that the self-test chose.

The choice is cached per bundle, component, machine, runtime version and thread count; `doctor` shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edge_reasoner.activation.child import open_candidate, read_golden, variant_of
from edge_reasoner.activation.choice import Candidate, CandidateReport, list_candidates, usable_variants
from edge_reasoner.activation.selftest import choose
from edge_reasoner.activation.store import (
    Activation,
    Machine,
    activation_path,
    check_import,
    keep_activation,
    matches,
    read_activation,
    this_machine,
)
from edge_reasoner.activation.trials import Confinement, Trials
from edge_reasoner.backends import load_backend
from edge_reasoner.backends.base import Backend, DecoderModel, EncoderModel, check_threads
from edge_reasoner.backends.golden import Clock, Trial
from edge_reasoner.contract.bundle.manifest import Component
from edge_reasoner.contract.bundle.open import Bundle
from edge_reasoner.errors import BackendError, BundleError, TargetError
from edge_reasoner.machine.isa import ImportProbe, native_import_is_safe

_CONFINED = Confinement()


@dataclass(frozen=True)
class Activated:
    """An open model, how it was chosen, and whether the choice came from the cache."""

    model: DecoderModel | EncoderModel
    activation: Activation
    from_cache: bool

    @property
    def decoder(self) -> DecoderModel:
        """The model of a decoder component."""
        return cast(DecoderModel, self.model)

    @property
    def encoder(self) -> EncoderModel:
        """The model of an encoder component."""
        return cast(EncoderModel, self.model)


def activate(
    bundle: Bundle,
    kind: str,
    *,
    threads: int,
    cache_dir: Path | None,
    clock: Clock = time.perf_counter,
    confinement: Confinement | None = _CONFINED,
    probe_import: Callable[[], ImportProbe] = native_import_is_safe,
) -> Activated:
    """Opens component `kind` in the fastest variant that reproduces its golden vectors here.

    The first call on a machine imports the runtime in a child process, then tests every candidate, each in a
    child process as `confinement` says (None: in this process, by `clock`; seconds to a minute); later calls
    read the choice from `cache_dir` (None: every call tests anew). Raises BundleError (no such component, bad
    golden vectors, a file that is no longer what was checked), TargetError (no variant can run here),
    VerificationError (none reproduces the golden vectors), InputError (threads), BackendError.
    """
    check_threads(threads)  # bad input, not a candidate that fails
    component = bundle.component(kind)
    golden = read_golden(bundle, component)
    check_import(cache_dir, probe_import)
    backends = _load_backends(component)
    machine = this_machine(backends, threads)
    setup = _Setup(bundle, component, backends, machine)
    bundle_id = bundle.manifest.bundle_id
    path = activation_path(cache_dir, bundle_id, kind, machine)
    cached = read_activation(path)
    if cached is not None and matches(cached, bundle_id, component, machine):
        model = setup.open_cached(cached)
        if model is not None:
            return Activated(model, cached, True)
    trials = Trials(bundle, component, golden, backends, threads, clock, confinement)
    activated = setup.run_self_test(trials.run)
    keep_activation(path, activated.activation)
    return activated


def cached_activation(
    bundle: Bundle, kind: str, *, threads: int, cache_dir: Path | None
) -> Activation | None:
    """The choice that `activate` would read from the cache, or None. Loads the runtime, opens no model."""
    component = bundle.component(kind)
    backends = _load_backends(component)
    machine = this_machine(backends, threads)
    return read_activation(activation_path(cache_dir, bundle.manifest.bundle_id, kind, machine))


def _load_backends(component: Component) -> dict[str, Backend]:
    names: set[str] = {variant.backend for variant in component.variants}
    return {name: load_backend(name) for name in sorted(names)}


@dataclass(frozen=True)
class _Setup:
    bundle: Bundle
    component: Component
    backends: Mapping[str, Backend]
    machine: Machine

    def open(self, candidate: Candidate) -> DecoderModel | EncoderModel:
        """Opens one candidate's model, in this process."""
        backend = self.backends[variant_of(self.component, candidate.variant_id).backend]
        return open_candidate(self.bundle, self.component, backend, candidate, self.machine.threads)

    def candidates(self) -> tuple[tuple[Candidate, ...], list[CandidateReport]]:
        """What can run here, and why the rest cannot. Raises BundleError."""
        usable, refused = usable_variants(self.component.variants, self.backends, self.machine.isa)
        return list_candidates(usable, self.machine.architecture), refused

    def run_self_test(self, run_trial: Callable[[Candidate], Trial]) -> Activated:
        """Tests every usable candidate, then opens the winner."""
        candidates, refused = self.candidates()
        if not candidates:
            reasons = "; ".join(f"{report.variant_id}: {report.reason}" for report in refused)
            raise TargetError(f"component {self.component.kind!r}: no variant can run here: {reasons}")
        self.check_files()
        outcome = choose(candidates, run_trial)
        activation = Activation(
            bundle_id=self.bundle.manifest.bundle_id,
            kind=self.component.kind,
            machine=self.machine,
            variant_id=outcome.candidate.variant_id,
            session_options=outcome.candidate.session_options,
            reference=outcome.candidate.reference,
            reports=(*refused, *outcome.reports),
        )
        return Activated(self.open(outcome.candidate), activation, False)

    def check_files(self) -> None:
        """Raises BundleError where a graph or its weights are no longer what was checked: that is no
        candidate's fault."""
        for graph in sorted({variant.graph for variant in self.component.variants}):
            self.bundle.graph(graph)

    def open_cached(self, cached: Activation) -> DecoderModel | EncoderModel | None:
        """The cached choice's model; None if it is no choice here or no longer opens, so that the self-test
        decides anew."""
        wanted = Candidate(
            variant_id=cached.variant_id,
            session_options=cached.session_options,
            reference=cached.reference,
        )
        if wanted not in self.candidates()[0]:  # a file of the cache may say anything
            return None
        try:
            return self.open(wanted)
        except (BackendError, BundleError):
            return None
