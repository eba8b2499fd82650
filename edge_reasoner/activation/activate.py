"""Opens a component of a bundle on this machine, in the configuration that the self-test chose.

The choice is cached per bundle, component, machine, runtime version and thread count; `doctor` shows it.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import msgspec

from edge_reasoner.activation.selftest import Candidate, CandidateReport, choose, list_candidates
from edge_reasoner.backends import load_backend
from edge_reasoner.backends.base import Backend, DecoderModel, EncoderModel
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
from edge_reasoner.files import write_atomically
from edge_reasoner.machine.isa import ImportProbe, isa_features, native_import_is_safe

_MAX_CACHE_BYTES = 1 << 20
#: Tried besides what a bundle asks for, where the architecture has known wrong or slow kernels.
_GENERIC_OPTIONS: Mapping[str, tuple[Mapping[str, str], ...]] = {
    "aarch64": ({"mlas.disable_kleidiai": "1"},),
    "arm64": ({"mlas.disable_kleidiai": "1"},),
}
#: The same weights with fp32 arithmetic, for a bundle without a reference variant that passes. Only
#: onnxruntime's x86 kernels heed it (tried with 1.31.1): an ARM bundle needs a reference variant of its own.
_LAST_RESORT_OPTIONS: Mapping[str, tuple[Mapping[str, str], ...]] = {
    "x86_64": ({"mlas.qnbit.force_fp32": "1"},),
    "AMD64": ({"mlas.qnbit.force_fp32": "1"},),
}


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may change which kernels run, or how fast."""

    architecture: str
    cpu: str
    isa: tuple[str, ...]
    runtime: str
    threads: int


class Activation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The configuration that one machine uses for one component, and why."""

    schema_version: Literal[1] = 1
    bundle_id: str
    kind: str
    machine: Machine
    variant_id: str
    session_options: dict[str, str]
    reference: bool
    reports: tuple[CandidateReport, ...]


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
    """Opens component `kind` in the fastest configuration that reproduces its golden vectors here.

    The first call on a machine imports the runtime in a child process, then tests every configuration
    (seconds to a minute); later calls read the choice from `cache_dir` (None: every call tests anew). Raises
    BundleError (no such component, bad golden vectors), TargetError (no variant can run here),
    VerificationError (none reproduces the golden vectors), BackendError.
    """
    component = bundle.component(kind)
    golden = parse_golden(bundle.read_bytes(component.golden, MAX_GOLDEN_BYTES), component.golden)
    check_golden(golden, component.spec, component.golden)
    _check_import(cache_dir, probe_import)
    backends = _load_backends(component)
    machine = _machine(backends, threads)
    setup = _Setup(bundle, component, golden, backends, machine, clock)
    path = _cache_path(cache_dir, bundle, kind, machine)
    cached = None if path is None else _read_cache(path)
    if cached is not None and _matches(cached, setup):
        model = setup.open_cached(cached)
        if model is not None:
            return Activated(model, cached, True)
    activated = setup.run_self_test()
    if path is not None:
        _keep(path, msgspec.json.encode(activated.activation))
    return activated


def cached_activation(
    bundle: Bundle, kind: str, *, threads: int, cache_dir: Path | None
) -> Activation | None:
    """The choice that `activate` would read from the cache, or None. Loads the runtime, opens no model."""
    component = bundle.component(kind)
    backends = _load_backends(component)
    path = _cache_path(cache_dir, bundle, kind, _machine(backends, threads))
    return None if path is None else _read_cache(path)


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
        if isinstance(self.component.spec, DecoderSpec):
            return backend.open_decoder(
                path,
                self.component.spec,
                provider=variant.execution_provider,
                session_options=candidate.session_options,
                threads=self.machine.threads,
            )
        return backend.open_encoder(
            path,
            self.component.spec,
            provider=variant.execution_provider,
            session_options=candidate.session_options,
            threads=self.machine.threads,
        )

    def variant(self, variant_id: str) -> Variant:
        """The variant of that id. Raises BundleError."""
        for variant in self.component.variants:
            if variant.id == variant_id:
                return variant
        raise BundleError(f"component {self.component.kind!r} has no variant {variant_id!r}")

    def run_self_test(self) -> Activated:
        """Tests every usable candidate; the winner's model is open."""
        usable, refused = self._usable()
        if not usable:
            reasons = "; ".join(f"{report.variant_id}: {report.reason}" for report in refused)
            raise TargetError(f"component {self.component.kind!r}: no variant can run here: {reasons}")
        architecture = self.machine.architecture
        candidates = list_candidates(
            usable, _GENERIC_OPTIONS.get(architecture, ()), _LAST_RESORT_OPTIONS.get(architecture, ())
        )
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
        except BackendError:
            return None

    def _trial(self, model: DecoderModel | EncoderModel) -> Trial:
        if isinstance(self.component.spec, DecoderSpec):
            return try_decoder(cast(DecoderModel, model), self.golden, self.clock)
        return try_encoder(cast(EncoderModel, model), self.golden, self.clock)

    def _usable(self) -> tuple[list[Variant], list[CandidateReport]]:
        usable, refused = [], []
        for variant in self.component.variants:
            if reason := self._why_not(variant):
                refused.append(
                    CandidateReport(
                        variant_id=variant.id,
                        session_options=variant.session_options,
                        passed=False,
                        reason=reason,
                    )
                )
            else:
                usable.append(variant)
        return usable, refused

    def _why_not(self, variant: Variant) -> str:
        """Why the variant cannot run here, or ""."""
        backend = self.backends[variant.backend]
        if _version(variant.minimum_runtime) > _version(backend.runtime_version):
            return f"needs {backend.name} {variant.minimum_runtime}, {backend.runtime_version} is installed"
        if variant.execution_provider not in backend.providers:
            return f"needs {variant.execution_provider}; installed: {', '.join(backend.providers)}"
        if missing := sorted(set(variant.isa_floor) - set(self.machine.isa)):
            return f"needs CPU features {', '.join(missing)}"
        return ""


def _machine(backends: Mapping[str, Backend], threads: int) -> Machine:
    return Machine(
        architecture=platform.machine(),
        cpu=_cpu_model(),
        isa=tuple(sorted(isa_features())),
        runtime=", ".join(f"{b.name} {b.runtime_version}" for b in backends.values()),
        threads=threads,
    )


def _cpu_model() -> str:
    """The CPU's name (x86) or its implementer and part numbers (ARM); "" where the system does not tell."""
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as file:
            text = file.read(1 << 20)
    except OSError:
        return platform.processor()
    names = re.findall(r"^(?:model name|CPU implementer|CPU part)[ \t]*:[ \t]*(.{1,80})$", text, re.MULTILINE)
    return " ".join(dict.fromkeys(names))[:200]


def _version(text: str) -> tuple[int, ...]:
    """Leading numbers of "1.23.2" or "onnxruntime 1.23.2". Raises BundleError."""
    match = re.fullmatch(r"(?:[A-Za-z-]+[ >=]+)?(\d{1,6}(?:\.\d{1,6}){0,3})(?:[.+-]?[A-Za-z].*)?", text)
    if match is None:
        raise BundleError(f"runtime version {text!r} is not like '1.23.2'")
    return tuple(map(int, match[1].split(".")))


def _cache_path(cache_dir: Path | None, bundle: Bundle, kind: str, machine: Machine) -> Path | None:
    """Where the choice for this bundle, component and machine is kept; None: nowhere."""
    identity = msgspec.json.encode([bundle.manifest.bundle_id, kind, machine])
    name = f"{hashlib.sha256(identity).hexdigest()[:32]}.json"
    return None if cache_dir is None else cache_dir / "activation" / name


def _matches(cached: Activation, setup: _Setup) -> bool:
    """A cache file says what it is for; one that was copied or tampered with is not believed."""
    passed = any(
        report.passed
        and (report.variant_id, report.session_options) == (cached.variant_id, cached.session_options)
        for report in cached.reports
    )
    return (
        passed
        and (cached.bundle_id, cached.kind) == (setup.bundle.manifest.bundle_id, setup.component.kind)
        and cached.machine == setup.machine
        and cached.variant_id in {variant.id for variant in setup.component.variants}
    )


def _read_cache(path: Path) -> Activation | None:
    """The cached activation; None if there is none or it cannot be read."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_CACHE_BYTES + 1)
        return msgspec.json.decode(data, type=Activation) if len(data) <= _MAX_CACHE_BYTES else None
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _check_import(cache_dir: Path | None, probe_import: Callable[[], ImportProbe]) -> None:
    """Imports the runtime in a child process once per machine and wheel: a wheel may die with SIGILL."""
    if cache_dir is None:
        probe_import().raise_if_unsafe()
        return
    identity = f"{platform.machine()} {_cpu_model()} {sorted(isa_features())} {_installed_runtime()}"
    path = cache_dir / "import" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    try:
        known = msgspec.json.decode(path.read_bytes()[:_MAX_CACHE_BYTES], type=ImportProbe)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        known = None
    # only a good answer is believed from the cache: a bad one may have been repaired since
    if known is not None and known.safe:
        return
    probe = probe_import()
    probe.raise_if_unsafe()
    _keep(path, msgspec.json.encode(probe))


def _installed_runtime() -> str:
    """Version of the installed onnxruntime wheel, found without importing it."""
    from importlib import metadata

    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-qnn"):
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _keep(path: Path, data: bytes) -> None:
    """Writes a cache file. One that cannot be written is no error: what it says is found out again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data)
