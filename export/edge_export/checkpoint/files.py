"""Reading a checkpoint's small side files: bounded in size, decoded strictly, errors in one line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec

from edge_export.checkpoint.json_file import is_there, read_bounded, read_json_value
from edge_reasoner.errors import CheckpointError

_MAX_SIDE_FILE_BYTES = 256 << 20

T = TypeVar("T")


def read_json(path: Path, kind: type[T]) -> T:
    """A JSON file as `kind` (a msgspec Struct or a plain type). Raises CheckpointError.

    As in every file that Python's json wrote, NaN and Infinity may stand where nobody reads them.
    """
    value = read_json_value(path, _MAX_SIDE_FILE_BYTES)
    try:
        return msgspec.convert(without_nulls(value, kind), type=kind)
    except (msgspec.ValidationError, UnicodeEncodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: corrupt: {error}") from error


def without_nulls(value: Any, kind: Any) -> Any:
    """The object without the nulls of fields of `kind` (a Struct) that take none: null means the default."""
    if not isinstance(value, dict) or not (isinstance(kind, type) and issubclass(kind, msgspec.Struct)):
        return value
    takes_null = {
        field.encode_name for field in msgspec.structs.fields(kind) if type(None) in get_args(field.type)
    }
    return {key: item for key, item in value.items() if item is not None or key in takes_null}


class _AddedToken(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Tokenizer(msgspec.Struct):
    added_tokens: list[_AddedToken] = []


class _Generation(msgspec.Struct):
    eos_token_id: int | list[int | None] | None = None


def special_tokens(directory: Path) -> dict[str, int]:
    """The special tokens of a directory's tokenizer.json: content → id."""
    path = directory / "tokenizer.json"
    if not is_there(path):
        return {}
    return {token.content: token.id for token in read_json(path, _Tokenizer).added_tokens if token.special}


def generation_eos(directory: Path) -> list[int]:
    """The eos ids of generation_config.json; empty if it states none, or is damaged (the tokenizer warns)."""
    path = directory / "generation_config.json"
    if not path.is_file():
        return []
    try:
        return token_ids(read_json(path, _Generation).eos_token_id)
    except CheckpointError:
        return []


def token_ids(value: int | list[int | None] | None) -> list[int]:
    """One id, several, or none: null and -1 say none."""
    listed = value if isinstance(value, list) else [value]
    return [token for token in listed if token is not None and token != -1]


def licence(directory: Path) -> str | None:
    """The `license:` of the model card's front matter, or None. A damaged card is as good as none."""
    path = directory / "README.md"
    if not path.is_file():
        return None
    try:
        data = read_bounded(path, _MAX_SIDE_FILE_BYTES)
    except CheckpointError:
        return None
    text = data.decode("utf-8-sig", "replace").replace("\r\n", "\n")
    front_matter = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    found = front_matter and re.search(r"^license:\s*['\"]?([\w.+-]+)", front_matter[1], re.MULTILINE)
    return found[1] if found else None
