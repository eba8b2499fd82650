"""Memory of this machine and what control groups leave of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from edge_reasoner.machine.limits import memory_left_bytes, memory_limit_bytes
from edge_reasoner.machine.sysfs import read_text

_SYSTEM = Path("/")

# psutil (7.2.2: a 157 kB wheel for x86-64 and aarch64, none for 32-bit Arm, where it needs a compiler) was
# weighed and not taken. On Linux it reads these same two lines of /proc/meminfo, and it knows neither control
# groups nor big cores nor power modes, so every reader here would stay.


def total_bytes(root: Path = _SYSTEM) -> int | None:
    """Physical memory or a lower limit of a control group; None where the machine does not tell."""
    return _least(_meminfo_bytes(root, "MemTotal") or _installed_bytes(root), memory_limit_bytes(root))


def available_bytes(root: Path = _SYSTEM) -> int | None:
    """What can be had without swapping, or less where the control groups leave less; None: not told."""
    return _least(_meminfo_bytes(root, "MemAvailable"), memory_left_bytes(root))


def _least(*sizes: int | None) -> int | None:
    return min((size for size in sizes if size is not None), default=None)


def _meminfo_bytes(root: Path, name: str) -> int | None:
    text = read_text(root / "proc/meminfo") or ""
    found = re.search(rf"^{name}:\s+(\d{{1,15}}) kB", text, flags=re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _installed_bytes(root: Path) -> int | None:
    """By the C library, where there is no /proc (macOS)."""
    if root != _SYSTEM:
        return None
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
    return size if size > 0 else None
