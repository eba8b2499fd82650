"""How many threads and bytes this process may use, and how that was found: exporter and runtime ask here."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from edge_reasoner.contract.profile.schema import Record
from edge_reasoner.machine.cpu import big_cores
from edge_reasoner.machine.limits import allowed_cpus, quota_cpus
from edge_reasoner.machine.memory import available_bytes

#: more threads only wait for memory
MAX_THREADS = 8


class Allowance(Record, frozen=True, kw_only=True):
    """What this process may use; `threads` is the least of what bounds it."""

    threads: int
    #: cores that the scheduler may put this process on, and the big ones of them
    cores: int
    big_cores: int
    #: CPUs of the control groups' quota; None: no quota
    quota_cpus: float | None = None
    #: available memory or what the control groups leave; None where the machine does not tell
    memory_bytes: int | None = None

    def reason(self) -> str:
        """What the threads were derived from, in a few words."""
        little = self.cores - self.big_cores
        parts = [f"{self.cores} cores of this process"] + ([f"{little} of them little"] if little else [])
        if self.quota_cpus is not None:
            parts.append(f"a quota of {self.quota_cpus:g} CPUs")
        return ", ".join(parts)


def allowance(
    root: Path = Path("/"), cpus: Collection[int] | None = None, *, most_threads: int = MAX_THREADS
) -> Allowance:
    """Reads the machine under `root`; `cpus` are those of this process's affinity (None: asked for).

    Threads are whole CPUs of the quota: of 1.5 CPUs two threads would wait for each other half of the time.
    """
    usable = frozenset(_affinity() if cpus is None else cpus) or frozenset({0})
    usable = usable & (allowed_cpus(root) or usable) or usable
    big, quota = big_cores(usable, root), quota_cpus(root)
    threads = min(len(big), most_threads, most_threads if quota is None else int(quota))
    return Allowance(
        threads=max(1, threads),
        cores=len(usable),
        big_cores=len(big),
        quota_cpus=quota,
        memory_bytes=available_bytes(root),
    )


def _affinity() -> Collection[int]:
    asked = getattr(os, "sched_getaffinity", None)
    return asked(0) if asked is not None else range(os.cpu_count() or 1)
