"""How the machine is doing now: temperature, governor, power mode, throttling. Reads only, all bounded."""

from __future__ import annotations

import re
import subprocess
from importlib import metadata
from pathlib import Path

from edge_reasoner.contract.profile.schema import Record
from edge_reasoner.machine.isa import RunProcess
from edge_reasoner.machine.sysfs import read_int, read_text

#: meaning of the bits of the Raspberry Pi's `vcgencmd get_throttled`
_THROTTLE_BITS = {
    0: "under-voltage now",
    1: "frequency capped now",
    2: "throttled now",
    3: "soft temperature limit now",
    16: "under-voltage since boot",
    17: "frequency capped since boot",
    18: "throttled since boot",
    19: "soft temperature limit since boot",
}
_VCGENCMD_TIMEOUT_S = 2.0
_MAX_ZONES = 64
_MAX_CORES = 4096


class MachineState(Record, frozen=True, kw_only=True):
    """A snapshot; None where the machine does not tell."""

    #: hottest thermal zone, °C, and its name
    temperature_c: float | None = None
    temperature_zone: str | None = None
    governor: str | None = None
    #: the Jetson's nvpmodel, else the firmware's platform profile
    power_mode: str | None = None
    #: highest clock that is allowed now over the highest that the cores have (the slowest core's): below 1
    #: cooling or a power mode holds them back
    clock_share: float | None = None
    #: None: no battery and no mains adapter that tells
    on_battery: bool | None = None
    #: the Raspberry Pi firmware's complaints; () is a clean bill, None: not a Pi
    throttling: tuple[str, ...] | None = None
    onnxruntime_version: str | None = None


def read_state(root: Path = Path("/"), run: RunProcess = subprocess.run) -> MachineState:
    """The machine's state from sysfs under `root`; `run` starts `vcgencmd` where that is installed."""
    zone, temperature = _hottest(root / "sys/class/thermal")
    return MachineState(
        temperature_c=temperature,
        temperature_zone=zone,
        governor=read_text(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or None,
        power_mode=_nvpmodel(root) or read_text(root / "sys/firmware/acpi/platform_profile", 256) or None,
        clock_share=_clock_share(root / "sys/devices/system/cpu"),
        on_battery=_on_battery(root / "sys/class/power_supply"),
        throttling=_throttling(root, run),
        onnxruntime_version=installed_onnxruntime(),
    )


def installed_onnxruntime() -> str | None:
    """Version of the installed onnxruntime (any build of it), without importing it."""
    wheel = installed_wheel()
    return None if wheel is None else wheel[1]


def installed_wheel() -> tuple[str, str] | None:
    """Which build of onnxruntime is installed, by its distribution's name, and its version."""
    for name in ("onnxruntime", "onnxruntime-gpu", "onnxruntime-qnn", "onnxruntime-openvino"):
        try:
            return name, metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def _hottest(folder: Path) -> tuple[str | None, float | None]:
    best: tuple[str | None, float | None] = (None, None)
    for zone in sorted(folder.glob("thermal_zone*"))[:_MAX_ZONES]:
        millidegrees = read_int(zone / "temp")
        if millidegrees is None or not -50_000 < millidegrees < 200_000:
            continue  # an absent sensor reads as nonsense
        if best[1] is None or millidegrees / 1e3 > best[1]:
            best = (read_text(zone / "type") or zone.name, millidegrees / 1e3)
    return best


def _clock_share(folder: Path) -> float | None:
    shares = []
    for cpufreq in sorted(folder.glob("cpu[0-9]*/cpufreq"))[:_MAX_CORES]:
        now, most = read_int(cpufreq / "scaling_max_freq"), read_int(cpufreq / "cpuinfo_max_freq")
        if now is not None and most is not None and now > 0 and most > 0:
            shares.append(min(1.0, now / most))
    return min(shares, default=None)


def _on_battery(folder: Path) -> bool | None:
    """Whether no adapter supplies power; where no adapter tells, whether a battery is being discharged."""
    adapters, batteries = [], []
    for supply in sorted(folder.glob("*"))[:_MAX_ZONES]:
        if read_text(supply / "scope", 64) == "Device":
            continue  # a mouse's or a phone's own battery
        kind = read_text(supply / "type", 64)
        if kind in ("Mains", "USB") and (online := read_int(supply / "online")) is not None:
            adapters.append(online != 0)
        elif kind == "Battery" and (status := read_text(supply / "status", 64)):
            batteries.append(status == "Discharging")
    if not batteries:
        return False if any(adapters) else None  # a board at a USB port that reports nothing has no battery
    return not any(adapters) if adapters else any(batteries)


def _nvpmodel(root: Path) -> str | None:
    """Name of the Jetson's power mode, from nvpmodel's state and configuration files."""
    status = re.search(r"pmode:0*(\d+)", read_text(root / "var/lib/nvpmodel/status") or "")
    if status is None:
        return None
    conf = read_text(root / "etc/nvpmodel.conf") or ""
    names = {
        int(number): name
        for number, name in re.findall(r"<\s*POWER_MODEL\s+ID=(\d{1,4})\s+NAME=([\w.-]{1,40})", conf)
    }
    number = int(status.group(1)[:4])
    return str(names.get(number, f"mode {number}"))


def _throttling(root: Path, run: RunProcess) -> tuple[str, ...] | None:
    tool = next((root / p for p in ("usr/bin/vcgencmd", "opt/vc/bin/vcgencmd") if (root / p).exists()), None)
    if tool is None:
        return None
    try:
        done = run(
            [str(tool), "get_throttled"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_VCGENCMD_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"throttled=0x([0-9a-fA-F]{1,8})\b", done.stdout)
    if found is None:
        return None
    bits = int(found.group(1), 16)
    return tuple(meaning for bit, meaning in _THROTTLE_BITS.items() if bits >> bit & 1)
