"""What control groups (v1 and v2) let this process use. Nested groups all bound it: the least counts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from edge_reasoner.machine.sysfs import parse_cpu_list, read_int, read_text

_MAX_DEPTH = 64
_MAX_MOUNTS = 1024
#: files of this kind are short, but for the mounts of a busy host
_MOUNTS_BYTES = 1 << 20
#: above this a v1 memory limit means "none" (the kernel writes the largest whole page below 2⁶³)
_NO_LIMIT_BYTES = 1 << 60
_V2 = ""
_DEFAULT_PERIOD_US = 100_000


def quota_cpus(root: Path = Path("/")) -> float | None:
    """CPUs that this process may keep busy, as 1.5; None: no quota, or none that can be read."""
    quotas = [_quota_v2(read_text(folder / "cpu.max", 256)) for folder in _folders(root, "cpu")]
    quotas += [
        _quota(read_int(folder / "cpu.cfs_quota_us"), read_int(folder / "cpu.cfs_period_us"))
        for folder in _folders(root, "cpu")
    ]
    return min((quota for quota in quotas if quota is not None), default=None)


def allowed_cpus(root: Path = Path("/")) -> frozenset[int] | None:
    """CPU numbers of the innermost cpuset; None where there is none."""
    for folder in _folders(root, "cpuset"):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            if cpus := parse_cpu_list(read_text(folder / name) or ""):
                return frozenset(cpus)
    return None


def memory_limit_bytes(root: Path = Path("/")) -> int | None:
    """The lowest memory limit; None: none."""
    limits = (_memory_limit(folder) for folder in _folders(root, "memory"))
    return min((limit for limit in limits if limit is not None), default=None)


def memory_left_bytes(root: Path = Path("/")) -> int | None:
    """What the tightest group has left below its limit, page cache that can be dropped counted as free."""
    left = []
    for folder in _folders(root, "memory"):
        limit = _memory_limit(folder)
        if limit is not None:
            left.append(max(0, limit - _used_bytes(folder)))
    return min(left, default=None)


def _memory_limit(folder: Path) -> int | None:
    names = ("memory.max", "memory.high", "memory.limit_in_bytes")
    found = [read_int(folder / name) for name in names]
    return min((size for size in found if size is not None and 0 < size < _NO_LIMIT_BYTES), default=None)


def _used_bytes(folder: Path) -> int:
    used = read_int(folder / "memory.current")
    if used is None:
        used = read_int(folder / "memory.usage_in_bytes") or 0
    stat = read_text(folder / "memory.stat") or ""
    found = re.search(r"^(?:total_)?inactive_file (\d{1,18})$", stat, flags=re.MULTILINE)
    return max(0, used - (int(found[1]) if found else 0))


def _quota_v2(text: str | None) -> float | None:
    """`cpu.max`: quota and period in µs; "max" is no quota."""
    found = re.fullmatch(r"(\d{1,15})(?:\s+(\d{1,15}))?", text or "")
    return None if found is None else _quota(int(found[1]), int(found[2] or _DEFAULT_PERIOD_US))


def _quota(quota_us: int | None, period_us: int | None) -> float | None:
    if quota_us is None or quota_us <= 0 or not period_us or period_us < 0:
        return None
    return quota_us / period_us


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """Every group folder that bounds this process for a controller, innermost first, v1 and v2.

    A group's path in /proc/self/cgroup is that of the host where the container has no cgroup namespace; its
    mount then shows a part of the tree only. Folders that are not there are not yielded.
    """
    paths = _group_paths(read_text(root / "proc/self/cgroup", _MOUNTS_BYTES) or "")
    seen = set()
    for kind, mount, shown in _mounts(root, controller):
        path = paths.get(kind, "/")
        inside = path[len(shown) :] if shown != "/" and f"{path}/".startswith(f"{shown}/") else path
        parts = [part for part in inside.split("/") if part not in ("", ".", "..")][:_MAX_DEPTH]
        for depth in range(len(parts), -1, -1):
            folder = mount.joinpath(*parts[:depth])
            if folder not in seen and folder.is_dir():
                seen.add(folder)
                yield folder


def _group_paths(text: str) -> dict[str, str]:
    """Controller ("" is v2) → path of this process's group."""
    paths: dict[str, str] = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, colon, path = rest.partition(":")
        if number.isdecimal() and colon and path.startswith("/"):
            for name in controllers.split(","):
                paths.setdefault(name, path)
    return paths


def _mounts(root: Path, controller: str) -> Iterator[tuple[str, Path, str]]:
    """(controller or "", mount point, the part of the tree that it shows): where mounted, then as usual."""
    lines = (read_text(root / "proc/self/mountinfo", _MOUNTS_BYTES) or "").splitlines()
    for shown, point, kind, options in islice(_cgroup_lines(lines), _MAX_MOUNTS):
        if kind == "cgroup2":
            yield _V2, root / point.lstrip("/"), shown
        elif controller in options.split(","):
            yield controller, root / point.lstrip("/"), shown
    base = root / "sys/fs/cgroup"
    yield _V2, base, "/"
    yield _V2, base / "unified", "/"
    yield controller, base / controller, "/"


def _cgroup_lines(lines: Iterable[str]) -> Iterator[tuple[str, str, str, str]]:
    """(shown root, mount point, type, options of the file system) of the cgroup lines of mountinfo."""
    for line in lines:
        before, dash, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if dash and len(left) >= 5 and len(right) >= 3 and right[0] in ("cgroup", "cgroup2"):
            yield left[3].rstrip("/") or "/", left[4], right[0], right[2]
