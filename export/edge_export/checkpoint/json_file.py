"""A checkpoint's small files: `edge_reasoner.files`, for regular files only, with CheckpointError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_export.checkpoint.foreign import HEAD_BYTES, what_it_is
from edge_reasoner import files
from edge_reasoner.errors import CheckpointError


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """The bytes of the file at `path`.

    Raises CheckpointError when it is missing, above the limit, or a download's stand-in (a Git LFS pointer).
    """
    data = files.read_bytes(path, limit_bytes, error=CheckpointError, regular=True)
    if (found := what_it_is(data[:HEAD_BYTES])) is not None:
        raise CheckpointError(f"{path}: {found}")
    return data


def is_there(path: Path) -> bool:
    """Whether something has the name. A link to nothing counts: reading it says so, where leaving it out
    would be silent (an interrupted download leaves such links)."""
    return path.exists() or path.is_symlink()


def read_text(path: Path, limit_bytes: int) -> str:
    """The UTF-8 text in the file at `path`; a byte order mark is skipped. Raises CheckpointError."""
    return files.decode_text(read_bounded(path, limit_bytes), str(path), error=CheckpointError)


def read_json_value(path: Path, limit_bytes: int) -> Any:
    """The JSON value in the file at `path`; NaN and Infinity are floats. Raises CheckpointError."""
    data = read_bounded(path, limit_bytes)
    return files.parse_json(data, str(path), error=CheckpointError, allow_nan=True)


def read_json_object(path: Path, limit_bytes: int, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in the file at `path`; an `optional` file that is missing, or null, counts as `{}`.

    Raises CheckpointError when the file is missing, too large, not UTF-8, not JSON or not an object.
    """
    if optional and not is_there(path):
        return {}
    value = read_json_value(path, limit_bytes)
    if optional and value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value
