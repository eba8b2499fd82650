"""Opens a component of a bundle on this machine, in the variant that the self-test chose.

The choice is cached per bundle, component, machine, runtime version and thread count; `doctor` shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from edge_reasoner.activation.choice import Candidate, list_candidates, usable_variants
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
from edge_reasoner.backends import load_backend
from edge_reasoner.backends.base import Backend, DecoderModel, EncoderModel, OpenOptions
from edge_reasoner.backends.golden import (
    Clock,
    Trial,
    check_golden,
    try_decoder,
    try_encoder,
)
from edge_reasoner.contract.bundle.manifest import (
    MAX_GOLDEN_BYTES,
    Component,
    DecoderSpec,
    GoldenSet,
    Variant,
    parse_golden,
)
from edge_reasoner.contract.bundle.open import Bundle
from edge_reasoner.errors import BackendError, BundleError, TargetError
from edge_reasoner.machine.isa import ImportProbe, native_import_is_safe


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
    probe_import: Callable[[], ImportProbe] = native_import_is_safe,
) -> Activated:
    """Opens component `kind` in the fastest variant that reproduces its golden vectors here.

    The first call on a machine imports the runtime in a child process, then tests every candidate
    (seconds to a minute); later calls read the choice from `cache_dir` (None: every call tests anew). Raises
    BundleError (no such component, bad golden vectors), TargetError (no variant can run here),
    VerificationError (none reproduces the golden vectors), BackendError.
    """
    component = bundle.component(kind)
    golden = parse_golden(bundle.read_bytes(component.golden, MAX_GOLDEN_BYTES), component.golden)
    check_golden(golden, component.spec, component.golden)
    check_import(cache_dir, probe_import)
    backends = _load_backends(component)
    machine = this_machine(backends, threads)
    setup = _Setup(bundle, component, golden, backends, machine, clock)
    bundle_id = bundle.manifest.bundle_id
    path = activation_path(cache_dir, bundle_id, kind, machine)
    cached = read_activation(path)
    if cached is not None and matches(cached, bundle_id, component, machine):
        model = setup.open_cached(cached)
        if model is not None:
            return Activated(model, cached, True)
    activated = setup.run_self_test()
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
    golden: GoldenSet
    backends: Mapping[str, Backend]
    machine: Machine
    clock: Clock

    def open(self, candidate: Candidate) -> DecoderModel | EncoderModel:
        """Opens one candidate's model."""
        variant = self.variant(candidate.variant_id)
        backend, path = self.backends[variant.backend], self.bundle.path_of(variant.graph)
        options: OpenOptions = {
            "provider": variant.execution_provider,
            "session_options": candidate.session_options,
            "threads": self.machine.threads,
        }
        if isinstance(self.component.spec, DecoderSpec):
            return backend.open_decoder(path, self.component.spec, **options)
        return backend.open_encoder(path, self.component.spec, **options)

    def variant(self, variant_id: str) -> Variant:
        """The variant of that id. Raises BundleError."""
        for variant in self.component.variants:
            if variant.id == variant_id:
                return variant
        raise BundleError(f"component {self.component.kind!r} has no variant {variant_id!r}")

    def run_self_test(self) -> Activated:
        """Tests every usable candidate; the winner's model is open."""
        usable, refused = usable_variants(self.component.variants, self.backends, self.machine.isa)
        if not usable:
            reasons = "; ".join(f"{report.variant_id}: {report.reason}" for report in refused)
            raise TargetError(f"component {self.component.kind!r}: no variant can run here: {reasons}")
        candidates = list_candidates(usable, self.machine.architecture)
        outcome = choose(candidates, self.open, self._trial)
        activation = Activation(
            bundle_id=self.bundle.manifest.bundle_id,
            kind=self.component.kind,
            machine=self.machine,
            variant_id=outcome.candidate.variant_id,
            session_options=outcome.candidate.session_options,
            reference=outcome.candidate.reference,
            reports=(*refused, *outcome.reports),
        )
        return Activated(outcome.model, activation, False)

    def open_cached(self, cached: Activation) -> DecoderModel | EncoderModel | None:
        """The cached choice's model; None if it no longer opens, so that the self-test decides anew."""
        candidate = Candidate(variant_id=cached.variant_id, session_options=cached.session_options)
        try:
            return self.open(candidate)
        except (BackendError, BundleError):  # BundleError: a file of the cache names options of its own
            return None

    def _trial(self, model: DecoderModel | EncoderModel) -> Trial:
        if isinstance(self.component.spec, DecoderSpec):
            return try_decoder(cast(DecoderModel, model), self.golden, self.clock)
        return try_encoder(cast(EncoderModel, model), self.golden, self.clock)
