"""pack: lists and hashes every file, writes the sealed manifest; the whole then moves into place."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from edge_export.checkpoint.tokenizer_files import TokenizerFiles
from edge_export.stages.store import data_file
from edge_export.stages.values import Measured, Packed, Reported, Run, extend
from edge_reasoner.contract.bundle.manifest import (
    MANIFEST_NAME,
    Component,
    FileEntry,
    GoldenSet,
    Manifest,
    Source,
    seal,
    to_canonical_json,
)
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.contract.bundle.tokenizer_files import (
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
    TokenizerConfig,
)
from edge_reasoner.contract.profile import profile_sha256
from edge_reasoner.errors import CheckFailedError, EdgeReasonerError, InputError

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_HASH_CHUNK_BYTES = 1 << 20
_MAX_NAME = 200
#: what takes part in making a component
_TOOLS: Final = (
    "edge-reasoner",
    "gguf",
    "numpy",
    "onnx-ir",
    "onnxruntime",
    "safetensors",
    "tokenizers",
    "torch",
)


def pack(run: Run, reported: Reported) -> Packed:
    """Completes the bundle in its folder. Raises CheckFailedError where it is larger than wanted."""
    folder, main = run.bundle, reported.components[0]
    manifest = write_manifest(
        folder,
        Manifest(
            schema_version=2,
            bundle_id="",
            version=main.options.version,
            profile=main.board.name,
            profile_sha256=profile_sha256(main.board),
            components=tuple(_component(folder, component) for component in reported.components),
            files=file_entries(folder, reported.files),
        ),
    )
    sizes = {
        "source_bytes": float(main.checkpoint.digest.size_bytes),
        "bundle_bytes": float(bundle_bytes(folder)),
    }
    for component in manifest.components:
        sizes[f"{component.kind}_bytes"] = float(sum(entry.size_bytes for entry in component.files))
    limit, size_mb = main.options.max_size_mb, sizes["bundle_bytes"] / 1e6
    if limit is not None and size_mb > limit:
        raise CheckFailedError(
            f"max_size_mb={limit:g}: the bundle takes {size_mb:.1f} MB; nothing was written"
        )
    return extend(Packed, reported, manifest=manifest, sizes=sizes)


def tool_versions() -> dict[str, str]:
    """Version of every library that takes part in making a component."""
    return {name: importlib.metadata.version(name) for name in _TOOLS}


def _component(folder: Path, made: Measured) -> Component:
    """Writes what is still missing of a component, and lists its files."""
    checkpoint, role = made.checkpoint, made.role
    golden = write_golden(folder, role, made.golden)
    graphs = {variant.graph for variant in made.variants}
    tokenizer = write_tokenizer(folder, role, made.tokenizer, made.chat_template)
    return Component(
        kind=role,
        name=checkpoint.name[:_MAX_NAME],
        version=made.options.version,
        licence=made.options.licence or checkpoint.licence or "unknown",
        source=Source(
            name=checkpoint.name[:_MAX_NAME],
            format=checkpoint.format,
            sha256=checkpoint.digest.sha256,
            size_bytes=checkpoint.digest.size_bytes,
            calibration_sha256=None if made.analysis is None else made.texts.calibration_sha256,
        ),
        tools=tool_versions(),
        plan=made.plan.to_dict(),
        spec=made.spec,
        variants=made.variants,
        golden=golden,
        tokenizer=f"tokenizer/{role}",
        files=file_entries(folder, [*graphs, data_file(made), golden, *tokenizer]),
        quality=dict(made.quality),
        predicted=made.predicted,
    )


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
    try:
        if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / MANIFEST_NAME).is_file()):
            raise InputError(f"{out}: exists and is not a bundle; choose another folder or remove it")
        if not out.absolute().parent.is_dir():
            raise InputError(f"{out}: the folder {out.absolute().parent} does not exist")
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror or error}") from error


def restore_earlier(out: Path) -> None:
    """Mends what an export left that was killed while it replaced the bundle at `out`.

    The earlier bundle, set aside by then, goes back where nothing has taken its place; where a bundle has, it
    is removed. What is in use, or is no sound bundle and the only thing left, stays.
    """
    if fcntl is None:
        return  # without locks nobody can tell
    target = _target(out)
    with contextlib.suppress(OSError):
        left = sorted(
            target.parent.glob(f".{glob.escape(target.name)}.*.old"),
            key=lambda path: path.stat().st_mtime,
            reverse=True,
        )
        for aside in left:
            _restore(aside, target)


def _restore(aside: Path, target: Path) -> None:
    with contextlib.suppress(OSError), _held(aside):
        if not any(aside.iterdir()):
            aside.rmdir()
        elif (target / MANIFEST_NAME).is_file():
            shutil.rmtree(aside, ignore_errors=True)
        elif _is_sound(aside):
            aside.replace(target)


def _is_sound(folder: Path) -> bool:
    try:
        open_bundle(folder)
    except EdgeReasonerError:
        return False
    return True


def _target(out: Path) -> Path:
    """A link to a folder stays a link: what it points to is replaced."""
    return out.absolute().resolve() if out.is_symlink() else out.absolute()


@contextmanager
def staging_folder(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out` that becomes `out` when the block ends, or vanishes when it fails.

    An earlier bundle at `out` is there, whole, until the new one takes its place. What a killed export has
    left beside `out` is removed.
    """
    target = _target(out)
    _remove_abandoned(target)
    try:
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise InputError(f"{out}: cannot be written: {error.strerror}") from error
    try:
        with _held(staging):
            yield staging
            staging.chmod(0o755)
            _move_into_place(staging, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _remove_abandoned(target: Path) -> None:
    """Removes staging folders of `target` that no running export holds: their export was killed."""
    if fcntl is None:
        return  # without locks nobody can tell
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.partial"):
        with contextlib.suppress(OSError), _held(left):
            if any(left.iterdir()):  # an empty one may have been made this instant, and not yet be held
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Marks a folder as in use by this process, for as long as it lives. OSError where another holds it."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _move_into_place(staging: Path, target: Path) -> None:
    """Renames `staging` to `target`; an earlier bundle steps aside, and comes back if that fails."""
    if not target.exists():
        staging.replace(target)
        return
    with _held(target):  # as long as it is aside: `restore_earlier` of another export leaves it alone
        _replace(staging, target)


def _replace(staging: Path, target: Path) -> None:
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
