"""A checkpoint's small files: `edge_reasoner.files`, for regular files only, with CheckpointError."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edge_reasoner import files
from edge_reasoner.errors import CheckpointError


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """The bytes of the file at `path`. Raises CheckpointError when it is missing or above the limit."""
    return files.read_bytes(path, limit_bytes, error=CheckpointError, regular=True)


def read_text(path: Path, limit_bytes: int) -> str:
    """The UTF-8 text in the file at `path`; a byte order mark is skipped. Raises CheckpointError."""
    return files.read_text(path, limit_bytes, error=CheckpointError, regular=True)


def read_json_value(path: Path, limit_bytes: int) -> Any:
    """The JSON value in the file at `path`; NaN and Infinity are floats. Raises CheckpointError."""
    return files.read_json(path, limit_bytes, error=CheckpointError, regular=True, allow_nan=True)


def read_json_object(path: Path, limit_bytes: int, *, optional: bool = False) -> dict[str, Any]:
    """The JSON object in the file at `path`; an `optional` file that is missing, or null, counts as `{}`.

    Raises CheckpointError when the file is missing, too large, not UTF-8, not JSON or not an object.
    """
    if optional and not path.exists():
        return {}
    value = read_json_value(path, limit_bytes)
    if optional and value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value
