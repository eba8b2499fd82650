"""The cores of this machine: which are big and which little."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from edge_reasoner.machine.sysfs import parse_cpu_list, read_int, read_text

#: A core is little if its capacity is below this share of the largest. Clocks differ less than capacities
#: (A55 1.8 GHz beside A76 2.4 GHz), and by a tenth between equal cores of a desktop: hence two shares.
_CAPACITY_SHARE = 0.7
_CLOCK_SHARE = 0.8
#: MIDR part numbers (implementer 0x41, Arm)
ARM_PARTS = {
    0xD03: "cortex-a53", 0xD04: "cortex-a35", 0xD05: "cortex-a55", 0xD07: "cortex-a57",
    0xD08: "cortex-a72", 0xD09: "cortex-a73", 0xD0A: "cortex-a75", 0xD0B: "cortex-a76",
    0xD0C: "neoverse-n1", 0xD0D: "cortex-a77", 0xD40: "neoverse-v1", 0xD41: "cortex-a78",
    0xD42: "cortex-a78ae", 0xD44: "cortex-x1", 0xD46: "cortex-a510", 0xD47: "cortex-a710",
    0xD48: "cortex-x2", 0xD49: "neoverse-n2", 0xD4B: "cortex-a78c", 0xD4F: "neoverse-v2",
    0xD80: "cortex-a520", 0xD81: "cortex-a720",
}  # fmt: skip
#: those of them that are the little ones wherever others stand beside them
_LITTLE_PARTS = frozenset({0xD03, 0xD04, 0xD05, 0xD46, 0xD80})


def big_cores(cpus: Collection[int], root: Path = Path("/")) -> frozenset[int]:
    """Those of `cpus` that are not little beside others of them; all where nothing tells them apart.

    Told by the scheduler's `cpu_capacity`, else by Intel's list of performance cores, else by Arm's part
    numbers, else by the highest clock. What is there for some cores only is not believed.
    """
    folder = root / "sys/devices/system/cpu"
    everyone = frozenset(cpus)
    capacity = {cpu: read_int(folder / f"cpu{cpu}/cpu_capacity") or 0 for cpu in everyone}
    if big := _above(capacity, _CAPACITY_SHARE):
        return big
    performance = parse_cpu_list(read_text(root / "sys/devices/cpu_core/cpus") or "")
    if big := everyone.intersection(performance):
        return big
    little = everyone & _little_parts(read_text(root / "proc/cpuinfo", limit_bytes=1 << 20) or "")
    if little and little != everyone:
        return everyone - little
    clock = {cpu: read_int(folder / f"cpu{cpu}/cpufreq/cpuinfo_max_freq") or 0 for cpu in everyone}
    return _above(clock, _CLOCK_SHARE) or everyone


def _above(figures: dict[int, int], share: float) -> frozenset[int]:
    """Cores of at least that share of the most; none where a figure is missing or all are alike."""
    if not figures or min(figures.values()) <= 0 or min(figures.values()) >= share * max(figures.values()):
        return frozenset()
    return frozenset(cpu for cpu, figure in figures.items() if figure >= share * max(figures.values()))


def _little_parts(cpuinfo: str) -> frozenset[int]:
    found = set()
    for paragraph in cpuinfo.split("\n\n"):
        number = re.search(r"^processor[ \t]*:[ \t]*(\d{1,4})$", paragraph, flags=re.MULTILINE)
        part = re.search(r"^CPU part[ \t]*:[ \t]*(0x[0-9a-fA-F]{1,4})$", paragraph, flags=re.MULTILINE)
        if number and part and int(part[1], 16) in _LITTLE_PARTS:
            found.add(int(number[1]))
    return frozenset(found)
