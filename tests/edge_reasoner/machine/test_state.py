"""Power and clocks: a battery, an adapter, cores that are held back."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_reasoner.machine.isa import ImportProbe
from edge_reasoner.machine.state import MachineState, read_state

SUPPLY = "sys/class/power_supply"
CPU = "sys/devices/system/cpu"


def state_of(root: Path, files: dict[str, str]) -> MachineState:
    """The state of a machine with these files."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return read_state(root)


BATTERY = {f"{SUPPLY}/BAT0/type": "Battery", f"{SUPPLY}/BAT0/status": "Discharging"}
MAINS = {f"{SUPPLY}/AC/type": "Mains"}


@pytest.mark.parametrize(
    ("files", "on_battery"),
    [
        ({}, None),
        (BATTERY, True),
        (BATTERY | {f"{SUPPLY}/BAT0/status": "Charging"}, False),
        (BATTERY | MAINS | {f"{SUPPLY}/AC/online": "0"}, True),
        # some firmware says "Discharging" of a full battery
        (BATTERY | MAINS | {f"{SUPPLY}/AC/online": "1"}, False),
        (MAINS | {f"{SUPPLY}/AC/online": "1"}, False),
        ({f"{SUPPLY}/usb/type": "USB", f"{SUPPLY}/usb/online": "0"}, None),
        (BATTERY | {f"{SUPPLY}/BAT0/scope": "Device"}, None),
        (BATTERY | {f"{SUPPLY}/BAT0/type": "\0\xff"}, None),
    ],
)
def test_power(tmp_path: Path, files: dict[str, str], on_battery: bool | None):
    """The adapter is believed before the battery; a mouse's battery is not the machine's."""
    assert state_of(tmp_path, files).on_battery is on_battery


def test_cores_that_are_held_back(tmp_path: Path):
    """The core whose clock is held lowest counts; what does not tell does not."""
    files = {
        f"{CPU}/cpu0/cpufreq/scaling_max_freq": "1800000",
        f"{CPU}/cpu0/cpufreq/cpuinfo_max_freq": "1800000",
        f"{CPU}/cpu4/cpufreq/scaling_max_freq": "1200000",
        f"{CPU}/cpu4/cpufreq/cpuinfo_max_freq": "2400000",
        f"{CPU}/cpu5/cpufreq/scaling_max_freq": "0",
        f"{CPU}/cpu5/cpufreq/cpuinfo_max_freq": "2400000",
    }
    assert state_of(tmp_path / "held", files).clock_share == 0.5
    assert state_of(tmp_path / "none", {}).clock_share is None


def test_the_platform_profile_is_a_power_mode(tmp_path: Path):
    """As laptops have it; the Jetson's own state is asked first."""
    assert state_of(tmp_path, {"sys/firmware/acpi/platform_profile": "low-power"}).power_mode == "low-power"


def test_doctor_warns_of_both():
    """A battery and a held clock are two warnings; a machine at the mains with free clocks has none."""
    from edge_reasoner.bench.doctor import warnings_of

    probe = ImportProbe(module="onnxruntime", safe=True, conclusive=True)
    found = warnings_of(MachineState(on_battery=True, clock_share=0.5), probe, {})
    assert len(found) == 2 and "50%" in found[0] and "battery" in found[1]
    assert warnings_of(MachineState(on_battery=False, clock_share=1.0), probe, {}) == []
