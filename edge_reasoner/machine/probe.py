"""Reads the machine it runs on and writes what it finds as a device profile.

CPU clusters, features and memory come from /proc and /sys, bandwidth from a short measurement. What cannot be
read (accelerators, runtimes, power, limits) is taken from the built-in profile whose `device_tree_models`
name the board, else from `generic-arm64` or `generic-x86`.
"""

from __future__ import annotations

import platform
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np

from edge_reasoner.contract.profile.load import list_profiles, load_profile
from edge_reasoner.contract.profile.schema import (
    Architecture,
    Cluster,
    DeviceProfile,
    Figure,
    Memory,
    Record,
    Runtime,
)
from edge_reasoner.errors import ProfileError
from edge_reasoner.machine.cpu import ARM_PARTS, big_cores
from edge_reasoner.machine.isa import isa_features
from edge_reasoner.machine.memory import total_bytes
from edge_reasoner.machine.state import installed_onnxruntime
from edge_reasoner.machine.sysfs import parse_cpu_list, read_int, read_text

#: Share of the plain read bandwidth that weight streaming reaches: onnxruntime's int4 MatMulNBits read
#: 86 MB in 3.6 ms on a machine that reads 28 GB/s.
STREAMING_SHARE = 0.85
_MATRIX_ROWS = 768
_CHUNK_BYTES = 64 * 1024 * 1024
_MAX_THREADS = 16


class Speed(Record, frozen=True, kw_only=True):
    """Measured speed: main memory in 10⁹ bytes per second (a copied byte counts once) and arithmetic."""

    read_gbps: float
    copy_gbps: float
    threads: int
    #: float32 matrix product, 10⁹ multiply-accumulates per second
    float_gmacs: float


class _Core(Record, frozen=True, kw_only=True):
    microarchitecture: str
    capacity: int
    clock_ghz: float
    big: bool


def probe_machine(
    *,
    root: Path = Path("/"),
    name: str = "this-machine",
    machine: str | None = None,
    features: frozenset[str] | None = None,
    measure: Callable[[int, int], Speed] | None = None,
    onnxruntime_version: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> DeviceProfile:
    """A profile of the running machine (or of the file tree under `root`, as tests use it).

    `machine` is the architecture (default: this one's), `features` the CPU features (default:
    `isa_features`), `measure` takes (threads, memory bytes) and returns the speed (default:
    `measure_speed`, about three seconds). Raises ProfileError on architectures other than aarch64 and
    x86_64.
    """
    say = progress or (lambda _line: None)
    architecture = _architecture(machine or platform.machine())
    base = load_profile(_nearest_profile(root, architecture))
    say(f"board: {_model(root)} (starting from profile {base.name})")
    if features is None:
        features = isa_features(root / "proc", machine)
    clusters = _clusters(root, features, base)
    cores = sum(c.cores for c in clusters if c.big)
    memory_bytes = total_bytes(root) or int(base.memory.capacity_gib.value * 2**30)
    say(f"cores: {', '.join(f'{c.cores} × {c.microarchitecture}' for c in clusters)}; measuring speed …")
    speed = (measure or measure_speed)(cores, memory_bytes)
    say(f"memory: {speed.read_gbps:.1f} GB/s read, {speed.copy_gbps:.1f} GB/s copied")
    say(f"arithmetic: {speed.float_gmacs:.0f} GMAC/s in float32")
    probed = msgspec.structs.replace(
        base,
        name=name,
        title=f"{_model(root)}, as probed"[:400],
        summary=f"Written by `edge-reasoner profiles probe`; what cannot be read comes from {base.name}.",
        architecture=architecture,
        os=_os_name(root),
        device_tree_models=(),
        clusters=clusters,
        memory=_memory(base, memory_bytes, speed),
        cpu=msgspec.structs.replace(
            base.cpu,
            float_gmacs=Figure(
                value=round(speed.float_gmacs, 3), basis="measured", source="numpy float32 product, by probe"
            ),
        ),
        runtimes=_runtimes(base, onnxruntime_version or installed_onnxruntime()),
        # What was read here beats what the base's file says of its board.
        cannot=tuple(limit for limit in base.cannot if features.isdisjoint(limit.features)),
    )
    if probed.export.threads > cores:
        probed = msgspec.structs.replace(probed, export=msgspec.structs.replace(probed.export, threads=cores))
    return probed.check(f"probe of {name}")


def measure_speed(
    threads: int,
    memory_bytes: int,
    *,
    seconds: float = 0.8,
    clock: Callable[[], float] = time.perf_counter,
) -> Speed:
    """Best of repeated reads and copies of memory far above the caches on `threads` threads, and of a float32
    matrix product on numpy's own threads.

    Takes about three times `seconds` and at most an eighth of `memory_bytes`.
    """
    threads = max(1, min(threads, _MAX_THREADS))
    chunk = max(1 << 20, min(_CHUNK_BYTES, memory_bytes // 8 // (2 * threads))) // 8 * 8
    sources = [np.ones(chunk // 8, dtype=np.int64) for _ in range(threads)]
    targets = [np.empty_like(source) for source in sources]
    total = chunk * threads
    with ThreadPoolExecutor(threads) as pool:

        def read() -> None:
            list(pool.map(np.max, sources))

        def copy() -> None:
            list(pool.map(np.copyto, targets, sources))

        read_s, copy_s = _best_s(read, seconds, clock), _best_s(copy, seconds, clock)
    left = np.ones((_MATRIX_ROWS, _MATRIX_ROWS), dtype=np.float32)
    product = np.empty_like(left)
    product_s = _best_s(lambda: np.matmul(left, left, out=product), seconds, clock)
    return Speed(
        read_gbps=total / read_s / 1e9,
        copy_gbps=total / copy_s / 1e9,
        threads=threads,
        float_gmacs=_MATRIX_ROWS**3 / product_s / 1e9,
    )


def _best_s(step: Callable[[], object], seconds: float, clock: Callable[[], float]) -> float:
    """Shortest run of `step` in `seconds` (one warm-up, then at least 3 and at most 1,000 runs)."""
    step()
    begin, best = clock(), float("inf")
    for run in range(1000):
        started = clock()
        step()
        ended = clock()
        best = min(best, max(ended - started, 1e-9))
        if run >= 2 and ended - begin >= seconds:
            break
    return best


def _architecture(machine: str) -> Architecture:
    if machine in ("aarch64", "arm64"):
        return "aarch64"
    if machine in ("x86_64", "AMD64"):
        return "x86_64"
    raise ProfileError(f"probe: architecture {machine!r} is not supported; allowed: aarch64, x86_64")


def _model(root: Path) -> str:
    """The board's or machine's own name for itself."""
    for path in (
        "proc/device-tree/model",
        "sys/firmware/devicetree/base/model",
        "sys/class/dmi/id/product_name",
    ):
        if text := read_text(root / path, limit_bytes=256):
            return " ".join(text.split())
    found = re.search(r"^model name[ \t]*:(.*)$", _cpuinfo(root), flags=re.MULTILINE)
    return found.group(1).strip()[:200] if found else "unknown machine"


def _nearest_profile(root: Path, architecture: Architecture) -> str:
    """The built-in profile that names this board (the longest match), else the generic one."""
    model = _model(root).lower()
    matches = [
        (len(part), name)
        for name in list_profiles()
        for profile in [load_profile(name)]
        if profile.architecture == architecture
        for part in profile.device_tree_models
        if part.lower() in model
    ]
    generic = "generic-arm64" if architecture == "aarch64" else "generic-x86"
    return max(matches)[1] if matches else generic


def _cpuinfo(root: Path) -> str:
    return read_text(root / "proc/cpuinfo", limit_bytes=1 << 20) or ""


def _os_name(root: Path) -> str:
    text = read_text(root / "etc/os-release") or ""
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', text, flags=re.MULTILINE)
    name = found.group(1).strip() if found else "Linux"
    return f"{name[:200]}, Python {platform.python_version()}"


def _clusters(root: Path, features: frozenset[str], base: DeviceProfile) -> tuple[Cluster, ...]:
    """Cores grouped by micro-architecture and clock, biggest first."""
    groups: dict[tuple[int, float, str, bool], int] = {}
    for core in _cores(root, base):
        key = (core.capacity, core.clock_ghz, core.microarchitecture, core.big)
        groups[key] = groups.get(key, 0) + 1
    return tuple(
        Cluster(
            cores=count,
            microarchitecture=name,
            big=big,
            clock_ghz=_clock_figure(root, clock),
            isa=tuple(sorted(features)),
        )
        for (_capacity, clock, name, big), count in sorted(groups.items(), reverse=True)
    )


def _clock_figure(root: Path, clock_ghz: float) -> Figure:
    if read_int(root / "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"):
        return Figure(value=clock_ghz, basis="measured", source="cpufreq's cpuinfo_max_freq, by probe")
    return Figure(
        value=clock_ghz, basis="estimated", source="no cpufreq here: /proc/cpuinfo or a default, by probe"
    )


def _cores(root: Path, base: DeviceProfile) -> list[_Core]:
    cpu_root = root / "sys/devices/system/cpu"
    blocks = _cpuinfo_blocks(root)
    online = parse_cpu_list(read_text(cpu_root / "online") or "") or tuple(sorted(blocks)) or (0,)
    big = big_cores(online, root)
    cores = []
    for number in online:
        block = blocks.get(number, {})
        khz = read_int(cpu_root / f"cpu{number}/cpufreq/cpuinfo_max_freq")
        cores.append(
            _Core(
                microarchitecture=_microarchitecture(cpu_root / f"cpu{number}", block),
                capacity=max(0, read_int(cpu_root / f"cpu{number}/cpu_capacity") or 0),
                clock_ghz=_clock_ghz(khz, block, base),
                big=number in big,
            )
        )
    if not all(core.capacity for core in cores):  # mixed zeros would not compare
        cores = [msgspec.structs.replace(core, capacity=0) for core in cores]
    return cores


def _clock_ghz(khz: int | None, block: dict[str, str], base: DeviceProfile) -> float:
    """GHz of one core; without cpufreq the board's profile's, or what /proc/cpuinfo says on x86 (rounded: it
    drifts from core to core)."""
    if khz and khz > 0:
        return round(khz / 1e6, 3)
    try:
        mhz = float(block.get("cpu mhz", ""))
    except ValueError:
        mhz = 0.0
    return round(mhz / 1e3, 1) if 100 < mhz < 20_000 else base.clusters[0].clock_ghz.value


def _cpuinfo_blocks(root: Path) -> dict[int, dict[str, str]]:
    """/proc/cpuinfo by processor number, keys lower-cased."""
    blocks: dict[int, dict[str, str]] = {}
    for paragraph in _cpuinfo(root).split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines())
        block = {key.strip().lower(): value.strip() for key, _, value in pairs if key.strip()}
        if (number := block.get("processor", "")).isdecimal():
            blocks[int(number)] = block
    return blocks


def _microarchitecture(folder: Path, block: dict[str, str]) -> str:
    """Arm's name for the core (by MIDR), or the model name on x86."""
    midr = read_int(folder / "regs/identification/midr_el1")
    try:
        implementer, part = int(block.get("cpu implementer", ""), 16), int(block.get("cpu part", ""), 16)
    except ValueError:
        if midr is None:
            return " ".join(block.get("model name", "").split())[:200] or "unknown"
        implementer, part = midr >> 24 & 0xFF, midr >> 4 & 0xFFF
    if implementer == 0x41 and part in ARM_PARTS:
        return ARM_PARTS[part]
    return f"implementer 0x{implementer:02x} part 0x{part:03x}"


def _memory(base: DeviceProfile, memory_bytes: int, speed: Speed) -> Memory:
    threads = f"{speed.threads} threads"
    return Memory(
        capacity_gib=Figure(
            value=round(memory_bytes / 2**30, 3), basis="measured", source="MemTotal, by probe"
        ),
        os_reserve_mib=base.memory.os_reserve_mib,
        # a generic profile's figure is a guess, a recognized board's is not
        theoretical_gbps=base.memory.theoretical_gbps if base.device_tree_models else None,
        effective_decode_gbps=Figure(
            value=round(STREAMING_SHARE * speed.read_gbps, 2),
            basis="estimated",
            source=f"{STREAMING_SHARE:g} of {speed.read_gbps:.2f} GB/s read by probe on {threads}",
        ),
        copy_gbps=Figure(
            value=round(speed.copy_gbps, 2), basis="measured", source=f"numpy copy by probe on {threads}"
        ),
    )


def _runtimes(base: DeviceProfile, version: str | None) -> tuple[Runtime, ...]:
    """The base's runtimes, onnxruntime at the installed version, claiming no newer opset than the base."""
    if version is None or not re.fullmatch(r"[0-9]+(\.[0-9]+){0,3}", version):
        return base.runtimes
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return tuple(
        msgspec.structs.replace(
            entry,
            newest_version=version,
            python=python,
            accepted_opset=entry.accepted_opset if version == entry.newest_version else entry.export_opset,
            source=f"installed here, by probe; operators and opset as in profile {base.name}",
        )
        if entry.backend == "onnxruntime"
        else entry
        for entry in base.runtimes
    )
