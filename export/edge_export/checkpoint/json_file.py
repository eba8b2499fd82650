"""Reads small text files of a checkpoint directory: regular files only, bounded in size."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path
from typing import Any

from edge_reasoner.errors import CheckpointError, InputError


def read_bounded(path: Path, limit_bytes: int) -> bytes:
    """The bytes of the file at `path`. Raises CheckpointError when it is missing or above the limit."""
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        with path.open("rb") as file:
            # read() allocates what it is asked for, so ask for no more than the file says it has
            data = file.read(min(limit_bytes, os.fstat(file.fileno()).st_size) + 1)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > limit_bytes:
        raise CheckpointError(f"{path}: larger than the {limit_bytes} bytes that are allowed")
    return data


def read_text(path: Path, limit_bytes: int) -> str:
    """The UTF-8 text in the file at `path`; a byte order mark is skipped.

    Raises CheckpointError when the file is missing, too large, or in another encoding (UTF-16 is named).
    """
    return decode_text(read_bounded(path, limit_bytes), path, CheckpointError)


def decode_text(data: bytes, path: Path, kind: type[InputError]) -> str:
    """The UTF-8 text in `data`, without a byte order mark. Raises `kind`, naming UTF-16 where it is that."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise kind(f"{path}: is UTF-16 text; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{path}: not UTF-8 text (byte {error.start:,})") from error


def read_json_value(path: Path, limit_bytes: int) -> Any:
    """The JSON value in the file at `path`; NaN and Infinity are floats. Raises CheckpointError."""
    text = read_text(path, limit_bytes)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error


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
