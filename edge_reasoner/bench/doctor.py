"""What `doctor` reports: the machine, the libraries, the kernels chosen for a bundle, and what is wrong."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import msgspec

from edge_reasoner._version import __version__
from edge_reasoner.activation.activate import activate, cached_activation
from edge_reasoner.activation.choice import CandidateReport
from edge_reasoner.contract.bundle.open import Bundle
from edge_reasoner.contract.profile.load import load_profile
from edge_reasoner.errors import CheckFailedError, ProfileError
from edge_reasoner.machine.isa import ImportProbe, isa_features
from edge_reasoner.machine.memory import available_bytes, total_bytes
from edge_reasoner.machine.state import MachineState, installed_onnxruntime
from edge_reasoner.machine.sysfs import read_text
from edge_reasoner.query.assemble import Machine

HOT_CELSIUS = 80.0
_SLOW_CLOCK_SHARE = 0.95
_LIBRARIES = ("numpy", "tokenizers", "httpx", "jinja2", "msgspec", "click", "rich", "starlette", "h11")
_SLOW_GOVERNORS = ("powersave", "conservative")


@dataclass(frozen=True)
class KernelCheck:
    """What the self-test says of one component. `origin`: from the cache, run just now, or not passed."""

    kind: str
    origin: Literal["cache", "run", "failed"]
    variant: str | None
    session_options: dict[str, str]
    reference: bool
    candidates: tuple[CandidateReport, ...]
    problem: str | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "kind": self.kind,
            "origin": self.origin,
            "variant": self.variant,
            "session_options": self.session_options,
            "reference": self.reference,
            "candidates": msgspec.to_builtins(self.candidates),
            "problem": self.problem,
        }


def machine_facts(state: MachineState, threads: int, root: Path = Path("/")) -> dict[str, Any]:
    """Architecture, CPU, memory, temperature …; None where the machine does not tell."""
    cpuinfo = read_text(root / "proc/cpuinfo", limit_bytes=1 << 20) or ""
    model = re.search(r"^model name[ \t]*:[ \t]*(.{1,200})$", cpuinfo, flags=re.MULTILINE)
    return {
        "architecture": platform.machine(),
        "system": platform.platform(),
        "cpu": model[1].strip() if model else None,
        "isa": sorted(isa_features()),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": total_bytes(root),
        "available_bytes": available_bytes(root),
        "temperature_c": state.temperature_c,
        "temperature_zone": state.temperature_zone,
        "governor": state.governor,
        "power_mode": state.power_mode,
        "clock_share": state.clock_share,
        "on_battery": state.on_battery,
        "throttling": None if state.throttling is None else list(state.throttling),
    }


def library_versions() -> dict[str, str | None]:
    """Installed versions, looked up without importing; None: not installed."""
    versions: dict[str, str | None] = {
        "edge_reasoner": __version__,
        "python": platform.python_version(),
        "onnxruntime": installed_onnxruntime(),
    }
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def check_kernels(
    bundle: Bundle, machine: Machine, *, kind: str | None = None, fresh: bool = False
) -> list[KernelCheck]:
    """The newest self-test of every component, or of the one of that kind.

    It is run now where none is cached; with `fresh` what is cached does not count, but is left as it is.
    Loads the inference library: ask the import probe first. Raises BundleError, BackendError.
    """
    kinds = [part.kind for part in bundle.manifest.components if kind in (None, part.kind)]
    if not fresh:
        return [_check_component(bundle, name, machine) for name in kinds]
    return [_check_component(bundle, name, replace(machine, cache_dir=None)) for name in kinds]


def warnings_of(
    state: MachineState,
    probe: ImportProbe,
    facts: dict[str, Any],
    bundle: Bundle | None = None,
    kernels: Sequence[KernelCheck] = (),
) -> list[str]:
    """What deserves attention, one line each."""
    found = [f"the Raspberry Pi's firmware reports: {complaint}" for complaint in state.throttling or ()]
    if state.temperature_c is not None and state.temperature_c >= HOT_CELSIUS:
        found.append(f"{state.temperature_zone} is at {state.temperature_c:.0f} °C: expect throttling")
    if state.governor in _SLOW_GOVERNORS:
        found.append(f"the CPU governor is {state.governor}; performance or schedutil answers faster")
    if state.clock_share is not None and state.clock_share < _SLOW_CLOCK_SHARE:
        found.append(
            f"the clock is held to {state.clock_share:.0%} of what the cores have: cooling or a power mode"
        )
    if state.on_battery:
        found.append("the machine runs on its battery: expect lower clocks")
    if not probe.safe or not probe.conclusive:
        found.append(probe.message)
    for kernel in kernels:
        found.extend(_kernel_warnings(kernel))
    if bundle is not None:
        found.extend(_bundle_warnings(bundle, facts))
    return found


def _check_component(bundle: Bundle, kind: str, machine: Machine) -> KernelCheck:
    cached = cached_activation(bundle, kind, threads=machine.threads, cache_dir=machine.cache_dir)
    origin: Literal["cache", "run"] = "run" if cached is None else "cache"
    if cached is None:
        try:
            activated = activate(bundle, kind, threads=machine.threads, cache_dir=machine.cache_dir)
        except CheckFailedError as error:
            return KernelCheck(kind, "failed", None, {}, False, (), str(error))
        activated.model.close()
        cached = activated.activation
    return KernelCheck(
        kind, origin, cached.variant_id, cached.session_options, cached.reference, cached.reports, None
    )


def _kernel_warnings(kernel: KernelCheck) -> list[str]:
    found = [] if kernel.problem is None else [f"{kernel.kind}: {kernel.problem}"]
    if kernel.reference:
        found.append(f"{kernel.kind}: only slow reference arithmetic reproduces the golden vectors here")
    for report in kernel.candidates:
        if not report.passed:
            options = ", ".join(f"{key}={value}" for key, value in report.session_options.items())
            found.append(
                f"{kernel.kind}: {report.variant_id} ({options or 'as is'}) is not used: {report.reason}"
            )
    return found


def _bundle_warnings(bundle: Bundle, facts: dict[str, Any]) -> list[str]:
    found = []
    available = facts["available_bytes"]
    for part in bundle.manifest.components:
        predicted = part.predicted
        if predicted is not None and available is not None and predicted.peak_rss_mb * 1e6 > available:
            found.append(
                f"the {part.kind} is predicted to take {predicted.peak_rss_mb:.0f} MB;"
                f" {available / 1e6:.0f} MB are free"
            )
    made_for, here = _architecture_of(bundle.manifest.profile), str(facts["architecture"])
    if made_for is not None and made_for != {"arm64": "aarch64", "AMD64": "x86_64"}.get(here, here):
        found.append(
            f"the bundle was made for {bundle.manifest.profile} ({made_for}); this machine is {here}"
        )
    return found


def _architecture_of(name: str) -> str | None:
    """A built-in profile's architecture; None for a profile that is not built in."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]*", name):
        return None
    try:
        return load_profile(name).architecture
    except ProfileError:
        return None
