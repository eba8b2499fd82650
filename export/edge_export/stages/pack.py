"""Packs a bundle: lists and hashes every file, writes the sealed manifest, moves the whole into place."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edge_export.checkpoint.tokenizer_files import TokenizerFiles
from edge_reasoner.contract.bundle.manifest import (
    MANIFEST_NAME,
    FileEntry,
    GoldenSet,
    Manifest,
    seal,
    to_canonical_json,
)
from edge_reasoner.contract.bundle.tokenizer_files import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TokenizerConfig,
)
from edge_reasoner.errors import InputError

_HASH_CHUNK_BYTES = 1 << 20
#: What the device's template sandbox accepts; a longer template is left out with a warning.
MAX_TEMPLATE_BYTES = 256 * 1024


def file_entries(folder: Path, paths: Iterable[str]) -> tuple[FileEntry, ...]:
    """Size and SHA-256 of each file (paths relative to the bundle's folder), sorted by path."""
    entries = []
    for path in sorted(paths):
        digest = hashlib.sha256()
        with (folder / path).open("rb") as stream:
            while chunk := stream.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
        entries.append(
            FileEntry(path=path, size_bytes=(folder / path).stat().st_size, sha256=digest.hexdigest())
        )
    return tuple(entries)


def write_tokenizer(folder: Path, kind: str, files: TokenizerFiles, template: str | None) -> tuple[str, ...]:
    """Writes `tokenizer/<kind>/…`; returns the relative paths."""
    base = f"tokenizer/{kind}"
    config = TokenizerConfig(
        add_bos=files.add_bos,
        bos_token=files.bos_token,
        eos_token=files.eos_token,
        unk_token=files.unk_token,
        pad_token=files.pad_token,
    )
    contents = {
        f"{base}/{TOKENIZER_FILE}": files.tokenizer_json,
        f"{base}/{TOKENIZER_CONFIG_FILE}": to_canonical_json(config),
    }
    if template is not None:
        contents[f"{base}/chat_template.jinja"] = template.encode("utf-8")
    (folder / base).mkdir(parents=True, exist_ok=True)
    for path, data in contents.items():
        (folder / path).write_bytes(data)
    return tuple(contents)


def write_golden(folder: Path, kind: str, golden: GoldenSet) -> str:
    """Writes `golden/<kind>.json`; returns the relative path."""
    path = f"golden/{kind}.json"
    (folder / "golden").mkdir(exist_ok=True)
    (folder / path).write_bytes(to_canonical_json(golden))
    return path


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Seals the manifest and writes it; returns it sealed."""
    sealed = seal(manifest)
    (folder / MANIFEST_NAME).write_bytes(to_canonical_json(sealed))
    return sealed


def bundle_bytes(folder: Path) -> int:
    """Bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def check_destination(out: Path) -> None:
    """Refuses to overwrite what is not a bundle. Raises InputError."""
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_NAME).is_file()):
        raise InputError(f"{out}: exists and is not a bundle; choose another --out or remove it")
    if not out.absolute().parent.is_dir():
        raise InputError(f"{out}: the folder {out.absolute().parent} does not exist")


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out` that becomes `out` when the block ends, or vanishes when it fails.

    An earlier bundle at `out` is there, whole, until the new one takes its place.
    """
    # A link to a folder stays a link: what it points to is replaced.
    target = out.absolute().resolve() if out.is_symlink() else out.absolute()
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from error
    try:
        yield staging
        staging.chmod(0o755)
        _move_into_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_into_place(staging: Path, target: Path) -> None:
    """Renames `staging` to `target`; an earlier bundle steps aside, and comes back if that fails."""
    if not target.exists():
        staging.replace(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    try:
        target.replace(aside)
        staging.replace(target)
    except BaseException:
        if target.exists():  # the old one did not move, or the new one is in place already
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.replace(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
