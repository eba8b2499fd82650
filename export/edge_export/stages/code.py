"""What every kept result depends on beside its inputs: this code, the libraries and the kind of machine."""

from __future__ import annotations

import functools
import hashlib
import platform
from pathlib import Path
from typing import Any

import torch

from edge_export.stages.pack import tool_versions
from edge_reasoner import errors

#: the parts of the device package that take part in an export
_DEVICE_ROOMS = ("backends", "contract")


def code_version() -> tuple[Any, ...]:
    """Results made by other code, libraries, threads or instruction sets are not reused."""
    return (
        _sources(),
        tool_versions(),
        platform.machine(),
        torch.backends.cpu.get_cpu_capability(),
        torch.get_num_threads(),
    )


@functools.cache
def _sources() -> str:
    """Digest of the modules that take part."""
    roots = [Path(__file__).parents[1]]
    roots += [Path(errors.__file__).parent / room for room in _DEVICE_ROOMS]
    digest = hashlib.sha256()
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            digest.update(f"\0{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()
