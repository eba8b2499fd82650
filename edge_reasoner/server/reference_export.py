"""From a checkpoint to the fp32 bundle that the reference cloud serves, made by the installed exporter.

The device never imports the export stage: it looks the function up among the installed entry points
(group `edge_reasoner.exporters`, name `reference`: `export_reference(model: str, out: Path) -> Path`). What
it made is kept by the checkpoint's content, so serving the same model again starts at once.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

from edge_reasoner._version import __version__
from edge_reasoner.contract.bundle.manifest import MANIFEST_NAME, SCHEMA_VERSION
from edge_reasoner.errors import InputError
from edge_reasoner.files import exists, is_file

ENTRY_POINT_GROUP = "edge_reasoner.exporters"
ENTRY_POINT_NAME = "reference"
_CHUNK_BYTES = 1 << 20
_MAX_FILES = 4096

Exporter = Callable[[str, Path], Path]


def reference_bundle(
    model: str,
    cache_dir: Path | None,
    *,
    say: Callable[[str], None],
    find: Callable[[], Exporter] | None = None,
) -> Path:
    """The bundle (a directory or a .tar) to serve for `model`: itself, or a cached or new fp32 export.

    `say` is told before the slow steps. Raises InputError: no such path, no exporter, no cache to export
    into; and what the exporter raises.
    """
    path = Path(model)
    if is_file(path / MANIFEST_NAME) or (path.suffix == ".tar" and is_file(path)):
        return path
    if not exists(path):
        raise InputError(
            f"{model}: no such bundle (a directory or a .tar), .gguf file or Hugging Face directory"
        )
    if not (is_file(path) or path.is_dir()):
        raise InputError(f"{model}: neither a file nor a directory")
    if cache_dir is None:
        raise InputError(
            f"{model}: no cache folder to export it into; set EDGE_REASONER_CACHE, or give a bundle directory"
        )
    export = (find or find_exporter)()
    say(f"reading {model} …")
    out = cache_dir / "reference" / content_key(path)
    if is_file(out / MANIFEST_NAME):
        return out
    say(f"exporting {model} in fp32, unpruned, to {out} (once) …")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{out.parent}: cannot be made: {error.strerror}; set EDGE_REASONER_CACHE, or give a bundle"
        ) from error
    return export(str(path), out)


def find_exporter() -> Exporter:
    """The installed exporter. Raises InputError saying what to install."""
    for entry in metadata.entry_points(group=ENTRY_POINT_GROUP, name=ENTRY_POINT_NAME):
        try:
            exporter: Exporter = entry.load()
        except ImportError as error:
            raise InputError(
                f"serving a checkpoint needs the export stage, which lacks {error.name or error};"
                " install edge-reasoner[export], or give a bundle directory"
            ) from error
        return exporter
    raise InputError(
        "serving a checkpoint needs the export stage: install edge-reasoner[export],"
        " or give a bundle directory"
    )


def content_key(path: Path) -> str:
    """Digest of this version (and schema), and of names and bytes of a file or a directory's regular files.

    Raises InputError when they cannot be read or are too many.
    """
    digest = hashlib.sha256(f"{__version__} {SCHEMA_VERSION}".encode())
    try:
        for name, file in _files(path):
            digest.update(f"\0{name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
    except OSError as error:
        raise InputError(f"{error.filename or path}: {error.strerror or error}") from error
    return digest.hexdigest()[:32]


def _files(path: Path) -> Iterator[tuple[str, Path]]:
    if path.is_file():
        yield "", path
        return
    count = 0
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = Path(folder, name)
            count += 1
            if count > _MAX_FILES:
                raise InputError(f"{path}: more than {_MAX_FILES} files; give one model's own directory")
            # links are followed: the hub's cache links to its blobs
            if not name.startswith(".") and file.exists() and stat.S_ISREG(file.stat().st_mode):
                yield str(file.relative_to(path)), file
