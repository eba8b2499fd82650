"""What to say of a manifest that another version of this project wrote.

Nothing of such a manifest is trusted or used, but for the words with which it can be made again.
"""

from __future__ import annotations

import shlex
from typing import Any

import msgspec

_MAX_WORD = 80


class _Named(msgspec.Struct, frozen=True):
    name: str = "MODEL"


class _Recipe(msgspec.Struct, frozen=True):
    recipe: str = "auto"


class _Part(msgspec.Struct, frozen=True):
    kind: str = ""


class _Old(msgspec.Struct, frozen=True):
    """The fields of schema 1 that say how its bundle was made."""

    schema_version: int
    source: _Named = _Named()
    profile: str = "BOARD"
    plan: _Recipe = _Recipe()
    components: tuple[_Part, ...] = ()


class _Versioned(msgspec.Struct, frozen=True):
    schema_version: int


def other_schema(data: bytes, current: int) -> str | None:
    """One line about a manifest whose schema version is not `current`; None where it is, or is unreadable."""
    found = _decode(data, _Versioned)
    if found is None or found.schema_version == current:
        return None
    version = found.schema_version
    if version > current or version < 1:
        return f"manifest.json: schema_version {version} is unknown; this edge-reasoner reads {current}"
    return (
        f"manifest.json: schema_version {version}; this edge-reasoner reads {current}: "
        f"export the model again: {_command(_decode(data, _Old))}"
    )


def _command(old: _Old | None) -> str:
    """The command line that makes such a bundle in today's schema."""
    if old is None:
        return "edge-export MODEL --profile BOARD"
    words = ["edge-export", _word(old.source.name), "--profile", _word(old.profile)]
    if old.plan.recipe != "auto":
        words += ["--recipe", _word(old.plan.recipe)]
    kinds = [part.kind for part in old.components]
    if "preprocessor" in kinds and "reasoner" in kinds:
        words += ["--preprocessor", "ENCODER"]
    return " ".join(words)


def _word(text: str) -> str:
    """One word of a shell, of printable characters only: the text is a stranger's."""
    shown = "".join(character for character in text[:_MAX_WORD] if character.isprintable())
    return shlex.quote(shown)


def _decode(data: bytes, kind: Any) -> Any:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
