"""Memory: what the machine has, what can be had, what control groups leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_reasoner.machine.memory import available_bytes, total_bytes

MEMINFO = "MemTotal:  8000 kB\nMemFree:  1 kB\nMemAvailable:   6000 kB\n"


@pytest.mark.parametrize(
    ("files", "total", "available"),
    [
        ({}, None, None),
        ({"proc/meminfo": MEMINFO}, 8_192_000, 6_144_000),
        ({"proc/meminfo": MEMINFO, "sys/fs/cgroup/memory.max": "max"}, 8_192_000, 6_144_000),
        (
            {
                "proc/meminfo": MEMINFO,
                "sys/fs/cgroup/memory.max": "2000000",
                "sys/fs/cgroup/memory.current": "500000",
            },
            2_000_000,
            1_500_000,
        ),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "3000000"}, 3_000_000, 3_000_000),
        ({"proc/meminfo": "MemTotal: lots"}, None, None),
    ],
)
def test_the_least_counts(tmp_path: Path, files: dict[str, str], total: int | None, available: int | None):
    """Physical memory or the group's limit; available memory or what the group has left; unknown is None."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert (total_bytes(tmp_path), available_bytes(tmp_path)) == (total, available)


def test_this_machine_tells():
    """Available memory is less than all of it."""
    total, available = total_bytes(), available_bytes()
    assert total and total > 1 << 24 and (available is None or 0 < available < total)
