"""Reads JSON-lines files of strangers: bounded, and with the line's number in every error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from edge_reasoner.errors import InputError

MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_ROWS = 1_000_000


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's number (from 1) and object; blank lines are skipped.

    Raises InputError: no such file, a line that is too long, not UTF-8, not JSON or not an object, too many
    rows, or none at all.
    """
    count = 0
    try:
        with path.open("rb") as file:
            number = 0
            while data := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(data) > MAX_LINE_BYTES:
                    raise InputError(f"{path} line {number}: more than {MAX_LINE_BYTES} bytes")
                if not data.strip():
                    continue
                count += 1
                if count > MAX_ROWS:
                    raise InputError(f"{path}: more than {MAX_ROWS} rows")
                yield number, _object(data, f"{path} line {number}")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if count == 0:
        raise InputError(f"{path}: no rows; one JSON object per line is needed")


def _object(data: bytes, where: str) -> dict[str, Any]:
    try:
        row = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: a {type(row).__name__}; each line must be a JSON object")
    return row
