"""The layout drawn in ARCHITECTURE.md is the one on disk and the one that the import contracts enforce."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINE = re.compile(r"^( *)((?:[\w/]+(?:/|\.py) ?)+)")


def drawing() -> Mapping[str, list[list[str]]]:
    """Folder as drawn -> its lines, each the names on it (packages end in a slash)."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    found = re.search(r"^```layout\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert found is not None, "ARCHITECTURE.md has no block marked layout"
    rooms: dict[str, list[list[str]]] = {}
    path: list[str] = []
    for line in found[1].splitlines():
        match = LINE.match(line)
        assert match is not None, line
        depth, names = len(match[1]) // 2, match[2].split()
        folder = "".join(path[:depth])
        rooms.setdefault(folder, []).append(names)
        path = [*path[:depth], names[0]]
    return rooms


def on_disk(folder: Path) -> set[str]:
    """Modules and packages of a folder, as they are drawn."""
    modules = {path.name for path in folder.glob("*.py") if path.name != "__init__.py"}
    return modules | {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}


def contracts() -> list[dict[str, Any]]:
    """The import contracts of pyproject.toml."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    found: list[dict[str, Any]] = toml.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"][
        "importlinter"
    ]["contracts"]
    return found


def test_every_drawn_room_is_there_and_every_room_is_drawn():
    """Each folder that is drawn with content holds just what is drawn."""
    rooms = drawing()
    assert rooms[""] == [["edge_reasoner/"], ["export/edge_export/"]]
    for folder, lines in rooms.items():
        if folder:
            drawn = {name for names in lines for name in names}
            # the boards' files are installed as a package but lie in a folder of their own
            assert drawn == on_disk(ROOT / folder) - {"device_profiles/"}, folder


@pytest.mark.parametrize(
    ("package", "folder"), [("edge_reasoner", "edge_reasoner/"), ("edge_export", "export/edge_export/")]
)
def test_the_drawing_is_what_the_contracts_enforce(package, folder):
    """The order of the drawing is that of the layers contract, which leaves nothing out."""
    layers = next(c for c in contracts() if c["type"] == "layers" and c["containers"] == [package])
    assert layers["exhaustive"]
    enforced = [{name.strip() for name in layer.split("|")} for layer in layers["layers"]]
    drawn = [{name.removesuffix(".py").rstrip("/") for name in names} for names in drawing()[folder]]
    assert drawn == enforced


def test_the_exporters_list_is_an_allow_list():
    """What is not forbidden to the exporter is what it may use: a new room has to be named."""
    contract = next(c for c in contracts() if c.get("source_modules") == ["edge_export"])
    forbidden = {name.removeprefix("edge_reasoner.") for name in contract["forbidden_modules"]}
    rooms = {name.removesuffix(".py").rstrip("/") for name in on_disk(ROOT / "edge_reasoner")}
    allowed = {"contract", "backends", "machine", "files", "errors", "_version"}
    assert rooms - forbidden - {"device_profiles"} == allowed and forbidden <= rooms


def test_no_contract_has_an_exemption():
    """No import is excused by name."""
    for contract in contracts():
        assert not contract.get("ignore_imports"), contract["name"]
