"""Finds the chat template of a Hugging Face directory, wherever it is kept.

As in transformers: chat_template.jinja, else `chat_template` of tokenizer_config.json, else
chat_template.json; where several have names, the one that is called "default".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from edge_export.checkpoint.json_file import is_there, read_json_object, read_text
from edge_export.checkpoint.tokenizer_files import MAX_CHAT_TEMPLATE_BYTES, check_chat_template
from edge_reasoner.errors import CheckpointError

#: Gemma's tokenizer_config.json lists every added token and has 1.2 MB.
MAX_CONFIG_BYTES: Final = 16 * 1024 * 1024
_DEFAULT: Final = "default"
_JINJA: Final = "chat_template.jinja"
_NAMED_FOLDER: Final = "additional_chat_templates"


@dataclass(frozen=True)
class FoundTemplate:
    """The default chat template, or None; `warnings` say why there is none where one might be expected."""

    text: str | None
    warnings: tuple[str, ...] = ()


def find_chat_template(directory: Path) -> FoundTemplate:
    """The template of a directory. Raises CheckpointError for one that is no text, or too large."""
    warnings: list[str] = []
    if is_there(path := directory / _JINJA):
        text = read_text(path, MAX_CHAT_TEMPLATE_BYTES)
        if text.strip():
            return FoundTemplate(text)
        warnings.append(f"{path}: empty; it is left aside")
    for name in ("tokenizer_config.json", "chat_template.json"):
        path = directory / name
        config = read_json_object(path, MAX_CONFIG_BYTES, optional=True)
        found = _stated(config.get("chat_template"), str(path))
        if found.text is not None:
            return found
        warnings.extend(found.warnings)
    folder = directory / _NAMED_FOLDER
    if is_there(path := folder / f"{_DEFAULT}.jinja"):
        return FoundTemplate(read_text(path, MAX_CHAT_TEMPLATE_BYTES), tuple(warnings))
    if named := sorted(path.stem for path in folder.glob("*.jinja")):
        warnings.append(_without_default(str(folder), named))
    return FoundTemplate(None, tuple(warnings))


def _stated(value: Any, where: str) -> FoundTemplate:
    """What `chat_template` of a JSON file states: a text, or several by name."""
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, Mapping):
        names = [str(name) for name in value]
        if value.get(_DEFAULT) is None:
            return FoundTemplate(None, (_without_default(where, names),) if names else ())
        value = value[_DEFAULT]
    if value is None:
        return FoundTemplate(None)
    if not isinstance(value, str):
        raise CheckpointError(f"{where}: chat_template must be a string, not {type(value).__name__}")
    if not value.strip():
        return FoundTemplate(None, (f"{where}: chat_template is empty; it is left aside",))
    return FoundTemplate(check_chat_template(value, where))


def _without_default(where: str, names: list[str]) -> str:
    shown = ", ".join(repr(name[:40]) for name in names[:5])
    return (
        f"{where}: has chat templates named {shown}, none of them {_DEFAULT!r}: the model is exported "
        "without one"
    )
