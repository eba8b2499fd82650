"""What self-tests found out, kept between runs.

Without a place to keep it, or with one that cannot be read or written, everything is found out again: that
is slower, and no error. A file that another user owns, or that anybody may write, counts as absent; what a
file says is taken only if this bundle and machine could have led to it.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from edge_reasoner.activation.choice import CandidateReport
from edge_reasoner.backends.base import Backend
from edge_reasoner.contract.bundle.manifest import Component
from edge_reasoner.files import read_own, write_atomically
from edge_reasoner.machine.isa import ImportProbe, isa_features
from edge_reasoner.machine.state import installed_wheel

T = TypeVar("T")

_MAX_CACHE_BYTES = 1 << 20


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may change which kernels run, or how fast."""

    architecture: str
    cpu: str
    isa: tuple[str, ...]
    runtime: str
    threads: int


class Activation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The candidate that one machine uses for one component, and why."""

    schema_version: Literal[1] = 1
    bundle_id: str
    kind: str
    machine: Machine
    variant_id: str
    session_options: dict[str, str]
    reference: bool
    reports: tuple[CandidateReport, ...]


def this_machine(backends: Mapping[str, Backend], threads: int) -> Machine:
    """This machine with these backends."""
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


def activation_path(cache_dir: Path | None, bundle_id: str, kind: str, machine: Machine) -> Path | None:
    """Where the choice for this bundle, component and machine is kept; None: nowhere."""
    identity = msgspec.json.encode([bundle_id, kind, machine])
    name = f"{hashlib.sha256(identity).hexdigest()[:32]}.json"
    return None if cache_dir is None else cache_dir / "activation" / name


def matches(cached: Activation, bundle_id: str, component: Component, machine: Machine) -> bool:
    """A cache file says what it is for; one that was copied or tampered with is not believed."""
    passed = any(
        report.passed
        and (report.variant_id, report.session_options) == (cached.variant_id, cached.session_options)
        for report in cached.reports
    )
    return (
        passed
        and (cached.bundle_id, cached.kind) == (bundle_id, component.kind)
        and cached.machine == machine
        and cached.variant_id in {variant.id for variant in component.variants}
    )


def read_activation(path: Path | None) -> Activation | None:
    """The cached activation; None if there is none or it cannot be read."""
    if path is None:
        return None
    return _kept(path, Activation)


def keep_activation(path: Path | None, activation: Activation) -> None:
    """Keeps a choice, if there is a place."""
    if path is not None:
        _keep(path, msgspec.json.encode(activation))


def check_import(cache_dir: Path | None, probe_import: Callable[[], ImportProbe]) -> None:
    """Imports the runtime in a child process once per machine and wheel: a wheel may die with SIGILL."""
    if cache_dir is None:
        probe_import().raise_if_unsafe()
        return
    identity = f"{platform.machine()} {_cpu_model()} {sorted(isa_features())} {installed_wheel()}"
    path = cache_dir / "import" / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
    known = _kept(path, ImportProbe)
    # only a good answer is believed from the cache: a bad one may have been repaired since
    if known is not None and known.safe:
        return
    probe = probe_import()
    probe.raise_if_unsafe()
    _keep(path, msgspec.json.encode(probe))


def _kept(path: Path, kind: type[T]) -> T | None:
    data = read_own(path, _MAX_CACHE_BYTES)
    try:
        return None if data is None else msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _keep(path: Path, data: bytes) -> None:
    """Writes a cache file. One that cannot be written is no error: what it says is found out again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, data, follow=False)
