"""The external data file of a bundle's graphs: regions, written once, read under any shape.

Weights are written as soon as they are known and are never all in memory; a graph only refers to their place
in the file, so several graphs (fast and reference kernels) share one copy of the weights, and one region can
be read under two shapes (tied embeddings).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Large regions start on a page, so that the runtime can map them instead of copying; small ones are packed.
_PAGE_BYTES = 4096
_MAPPED_BYTES = 256 * 1024
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Region:
    """A place in the external data file."""

    offset: int
    size_bytes: int


class ExternalData:
    """The weights file being written. A context manager; regions are aligned, gaps are zero.

    With `resume`, what is at `path` already is the file's beginning.
    """

    def __init__(self, path: Path, *, resume: bool = False) -> None:
        self.path = path
        self._file = path.open("ab" if resume else "wb")
        self._offset = self._file.tell()

    def __enter__(self) -> ExternalData:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, array: NDArray[Any]) -> Region:
        """Writes an array and returns its place."""
        return self.append_parts([array], array.nbytes)

    def append_parts(self, parts: Iterable[NDArray[Any]], size_bytes: int) -> Region:
        """Writes arrays, `size_bytes` together, without gaps between them; returns their common place."""
        gap = -self._offset % (_PAGE_BYTES if size_bytes >= _MAPPED_BYTES else _ALIGNMENT_BYTES)
        self._file.write(b"\0" * gap)
        region = Region(self._offset + gap, size_bytes)
        written = sum(self._file.write(np.ascontiguousarray(part).data) for part in parts)
        assert written == size_bytes, f"{written} bytes written, {size_bytes} announced"
        self._offset = region.offset + size_bytes
        return region

    def flushed_path(self) -> Path:
        """The file's path, everything written so far readable in it."""
        self._file.flush()
        return self.path


def read_region(path: Path, region: Region, dtype: Any, shape: Sequence[int]) -> NDArray[Any]:
    """An array out of a finished or growing data file (a copy)."""
    count = region.size_bytes // np.dtype(dtype).itemsize
    return np.fromfile(path, dtype=dtype, count=count, offset=region.offset).reshape(shape)
