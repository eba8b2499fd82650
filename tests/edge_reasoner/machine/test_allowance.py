"""Threads and bytes that this process may use, from the files of machines we do not have."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_reasoner.machine.allowance import allowance

V2 = "29 22 0:26 {shown} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
V1 = "30 22 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def cores(kind: str, values: list[int]) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{n}/{kind}": f"{value}\n" for n, value in enumerate(values)}


@pytest.mark.parametrize(
    ("files", "threads"),
    [
        ({}, 4),
        ({"sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 2),
        ({"sys/fs/cgroup/cpu.max": "1000 100000\n"}, 1),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 4),
        (
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            4,
        ),
        (
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        ({"sys/fs/cgroup/cpu.max": "100000 0\n"}, 4),
        ({"sys/fs/cgroup/cpu.max": "nonsense"}, 4),
        ({"sys/fs/cgroup/cpuset.cpus.effective": "0-2\n"}, 3),
        (cores("cpu_capacity", [1024, 1024, 381, 381]), 2),
        (cores("cpu_capacity", [1024, 1024, 0, 0]), 4),
        (cores("cpufreq/cpuinfo_max_freq", [2_400_000, 1_800_000, 1_800_000, 1_800_000]), 1),
        (cores("cpufreq/cpuinfo_max_freq", [5_300_000, 5_300_000, 5_000_000, 5_000_000]), 4),
        ({"sys/devices/cpu_core/cpus": "0-1\n"}, 2),
    ],
)
def test_threads_are_what_the_tightest_bound_allows(tmp_path: Path, files: dict[str, str], threads: int):
    """Quotas of v1 and v2, cpusets, little cores by capacity, clock or Intel's list; oddities are unknown."""
    assert allowance(tree(tmp_path, files), range(4)).threads == threads


def test_affinity_decides_which_cores_are_compared(tmp_path: Path):
    """Confined to little cores, all of them are used; eight threads are the most."""
    root = tree(tmp_path, cores("cpu_capacity", [381] * 4 + [1024] * 4))
    assert allowance(root, {0, 1, 2, 3}).threads == 4
    assert allowance(root, range(8)).threads == 4
    assert allowance(tmp_path / "none", range(64)).threads == 8


def test_nested_groups_all_count(tmp_path: Path):
    """The least quota and the least memory over the path from the process's group to the root."""
    files = {
        "proc/self/cgroup": "0::/a/b\n",
        "proc/self/mountinfo": V2.format(shown="/"),
        "proc/meminfo": "MemTotal: 8000000 kB\nMemAvailable: 4000000 kB\n",
        "sys/fs/cgroup/a/cpu.max": "200000 100000\n",
        "sys/fs/cgroup/a/b/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/a/memory.max": "1000000\n",
        "sys/fs/cgroup/a/memory.current": "600000\n",
        "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 500000\n",
        "sys/fs/cgroup/a/b/memory.max": "max\n",
    }
    found = allowance(tree(tmp_path, files), range(4))
    assert (found.threads, found.quota_cpus, found.memory_bytes) == (2, 2.0, 900_000)
    assert found.reason() == "4 cores of this process, a quota of 2 CPUs"


def test_a_container_that_sees_a_part_of_the_tree(tmp_path: Path):
    """Without a cgroup namespace the path is the host's, and the mount shows a part of its tree."""
    files = {
        "proc/self/cgroup": "0::/docker/x/inner\n",
        "proc/self/mountinfo": V2.format(shown="/docker/x"),
        "sys/fs/cgroup/cpu.max": "300000 100000\n",
        "sys/fs/cgroup/inner/cpu.max": "100000 100000\n",
    }
    assert allowance(tree(tmp_path, files), range(4)).threads == 1


def test_joined_v1_controllers(tmp_path: Path):
    """`cpu,cpuacct` is found where it is mounted; an unlimited v1 memory group is no limit."""
    files = {
        "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n5:memory:/docker/x\n",
        "proc/self/mountinfo": V1,
        "proc/meminfo": "MemAvailable: 1000 kB\n",
        "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "50000\n",
        "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": "9223372036854771712\n",
    }
    found = allowance(tree(tmp_path, files), range(4))
    assert (found.threads, found.memory_bytes) == (2, 1_024_000)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(data=st.binary(max_size=60))
def test_odd_files_are_unknown(tmp_path: Path, data: bytes):
    """Whatever is in the files, there is an allowance of one thread or more."""
    names = ("proc/self/cgroup", "proc/self/mountinfo", "proc/meminfo", "proc/cpuinfo")
    names += ("sys/fs/cgroup/cpu.max", "sys/fs/cgroup/memory.max", "sys/devices/system/cpu/cpu0/cpu_capacity")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert 1 <= allowance(tmp_path, range(4)).threads <= 4
