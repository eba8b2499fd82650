"""Reading and writing device profiles (TOML).

Built-in profiles are the files of the package `edge_reasoner.device_profiles` (the top-level folder
`device_profiles/`); a file's name is its profile's name. Profiles are untrusted input: size bounded, strictly
typed, one clear ProfileError per malformation.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.resources
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from edge_reasoner.contract.profile.schema import DeviceProfile, allowed_values
from edge_reasoner.errors import ProfileError, one_line, shown
from edge_reasoner.files import decode_text, read_bytes

#: A profile file larger than this is refused before it is parsed.
MAX_PROFILE_BYTES = 128 * 1024
#: Tables and arrays nested deeper than this are refused (the schema needs 4).
MAX_DEPTH = 8
BUILTIN_PACKAGE = "edge_reasoner.device_profiles"

if TYPE_CHECKING:  # moved between Python 3.10 and 3.14
    from importlib.abc import Traversable

_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")


def list_profiles() -> tuple[str, ...]:
    """Names of the built-in profiles, sorted."""
    names = (entry.name for entry in _builtin_folder().iterdir())
    return tuple(sorted(name[: -len(".toml")] for name in names if name.endswith(".toml")))


def load_profile(name_or_path: str | Path) -> DeviceProfile:
    """A built-in profile by its name, or a profile file by its path (anything with `/` or ending in `.toml`).

    Raises ProfileError: unknown name (with the nearest names), unreadable file, malformed profile.
    """
    if not isinstance(name_or_path, (str, Path)):
        raise ProfileError(
            f"profile={shown(name_or_path)} is not allowed; give a board's name or a .toml's path"
        )
    text = str(name_or_path)
    if isinstance(name_or_path, Path) or "/" in text or "\\" in text or text.endswith(".toml"):
        return parse_profile(read_bytes(Path(text), MAX_PROFILE_BYTES, error=ProfileError), text)
    names = list_profiles()
    if text not in names:
        raise ProfileError(_unknown(text, names))
    data = _builtin_folder().joinpath(f"{text}.toml").read_bytes()
    return parse_profile(data, f"built-in profile {text!r}")


def parse_profile(data: bytes, where: str) -> DeviceProfile:
    """Strictly parses one TOML profile; `where` names it in errors. Raises ProfileError."""
    if len(data) > MAX_PROFILE_BYTES:
        raise ProfileError(f"{where}: over {MAX_PROFILE_BYTES} bytes; a profile is smaller")
    try:
        tree = _toml_loads()(decode_text(data, where, error=ProfileError))
    except RecursionError as error:
        raise ProfileError(f"{where}: nested too deeply") from error
    except ValueError as error:  # tomllib.TOMLDecodeError, and numbers too long for int()
        raise ProfileError(f"{where}: not valid TOML: {one_line(error)}") from error
    if _deeper_than(tree, MAX_DEPTH):
        raise ProfileError(f"{where}: nested too deeply (at most {MAX_DEPTH} levels)")
    try:
        profile = msgspec.convert(tree, DeviceProfile, strict=True)
    except (msgspec.ValidationError, OverflowError) as error:
        raise ProfileError(f"{where}: {_explain(one_line(error))}") from error
    return profile.check(where)


def profile_sha256(profile: DeviceProfile) -> str:
    """SHA-256 (hex) of the profile's canonical JSON: independent of the file's layout and comments."""
    return hashlib.sha256(msgspec.json.encode(profile, order="sorted")).hexdigest()


def dump_profile_toml(profile: DeviceProfile) -> str:
    """The profile as TOML text; `parse_profile` of it gives the same profile back."""
    tree = cast(dict[str, Any], msgspec.to_builtins(profile))
    return "\n".join(_emit_table(tree, "")).lstrip("\n") + "\n"


def _toml_loads() -> Callable[[str], dict[str, Any]]:
    """`tomllib.loads`, or tomli's where Python has no tomllib (3.10)."""
    module = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    return cast("Callable[[str], dict[str, Any]]", module.loads)


def _builtin_folder() -> Traversable:
    """The installed profiles' folder. Raises ProfileError where the package is missing."""
    try:
        return importlib.resources.files(BUILTIN_PACKAGE)
    except ModuleNotFoundError as error:
        raise ProfileError(f"no built-in profiles: {BUILTIN_PACKAGE} is not installed; reinstall") from error


def _unknown(text: str, names: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(text.lower().replace("_", "-"), names, n=3, cutoff=0.4)
    near += [n for n in names if _NAME.fullmatch(text) and text in n and n not in near][:3]
    shown = text if len(text) <= 80 else text[:77] + "…"
    hint = f"nearest: {', '.join(near)}" if near else f"allowed: {', '.join(names)}"
    return f"unknown profile {shown!r}; {hint}; or give the path of a .toml file"


def _explain(message: str) -> str:
    """msgspec's message, with the allowed values where the field is a closed set."""
    _, found, place = message.partition("`$")
    if not found or not place.endswith("`") or "Invalid enum value" not in message:
        return message
    field = re.sub(r"\[[^\[\]]*\]", "", place[:-1]).rpartition(".")[2]
    allowed = ", ".join(str(v) for v in allowed_values(field))
    return f"{message}; allowed: {allowed}" if allowed else message


def _deeper_than(node: object, levels: int) -> bool:
    children = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return levels < 0 or any(_deeper_than(child, levels - 1) for child in children)


def _is_inline(value: object) -> bool:
    """Figures are written inline; other tables get a header."""
    return isinstance(value, dict) and set(value) == {"value", "basis", "source"}


def _emit_pair(key: str, value: object) -> str:
    """`key = value`, a figure on one line."""
    import tomli_w  # only `profiles probe` writes

    if isinstance(value, dict):
        return f"{key} = {{ {', '.join(_emit_pair(name, part) for name, part in value.items())} }}"
    return tomli_w.dumps({key: value}).rstrip("\n")


def _emit_table(table: dict[str, Any], prefix: str) -> list[str]:
    """Lines of one table: its own keys first, then sub-tables, then arrays of tables. None is left out."""
    lines: list[str] = []
    nested: list[str] = []
    for key, value in table.items():
        path = f"{prefix}{key}"
        if value is None:
            continue
        if isinstance(value, dict) and not _is_inline(value):
            nested += ["", f"[{path}]", *_emit_table(value, f"{path}.")]
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], dict):
            for item in value:
                nested += ["", f"[[{path}]]", *_emit_table(item, f"{path}.")]
        else:
            lines.append(_emit_pair(key, value))
    return lines + nested
