"""A bundle as one uncompressed `.tar`: packed for transport, unpacked into a cache folder before it runs.

Nothing in the archive is trusted: only plain files with plain relative paths, each listed in the manifest
with exactly its size; no links, devices, sparse files, duplicates or compression; reads are bounded, so a
header that claims gigabytes is refused before any memory is taken.
"""

from __future__ import annotations

import errno
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from edge_reasoner.contract.bundle.manifest import (
    MANIFEST_NAME,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    Manifest,
    check_relative_path,
    parse_manifest,
)
from edge_reasoner.contract.bundle.open import SIGNATURE_NAME, Bundle, open_bundle
from edge_reasoner.errors import BundleError
from edge_reasoner.files import (
    marked,
    open_given,
    remove_abandoned,
    remove_any,
    sync_folder,
    write_atomically,
)

#: how folders begin that an interrupted unpacking may leave behind
STAGING_PREFIX = ".edge-reasoner-unpack-"

_CHUNK_BYTES = 1 << 20
_MAX_SIGNATURE_BYTES = 64 * 1024
_FOLDER_MODE = 0o755
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: how compressed archives begin
_COMPRESSED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))


def pack_bundle(bundle: Bundle, archive: str | os.PathLike[str]) -> Path:
    """Writes a verified bundle as an uncompressed `.tar`, in one step and with the same bytes every time.

    The manifest comes first. Raises BundleError: `archive` exists, lies inside the bundle or cannot be
    written, or a file changed since the bundle was opened.
    """
    path = Path(archive)
    if os.path.lexists(path):
        raise BundleError(f"{path}: exists already; remove it or give another name")
    try:
        if path.parent.resolve().is_relative_to(bundle.root):
            raise BundleError(f"{path}: lies inside the bundle itself; give a place outside of it")
        write_atomically(path, _archive(bundle))
    except OSError as error:
        raise BundleError(f"{error.filename or path}: {error.strerror or error}") from error
    return path


def unpack_bundle_to(archive: str | os.PathLike[str], folder: str | os.PathLike[str]) -> Bundle:
    """Unpacks a bundle `.tar` to `folder`, which appears in one step, whole and verified.

    Raises BundleError: no plain bundle archive, or `folder` exists (an empty one is taken) or cannot be made;
    nothing stays behind then.
    """
    path, target = Path(archive), Path(folder)
    if os.path.lexists(target) and not (target.is_dir() and not any(target.iterdir())):
        raise BundleError(f"{target}: exists already; remove it or give another name")
    with _opened(path) as tar:
        members, _ = _checked(tar, path)
        with _staged(tar, members, path, target.parent) as bundle:
            bundle.root.chmod(_FOLDER_MODE)
            return _placed(bundle, target)


def unpack_bundle(archive: str | os.PathLike[str], cache_dir: Path) -> Bundle:
    """Unpacks a bundle `.tar` to `cache_dir/bundles/<bundle_id>` and returns that bundle, verified in full.

    A bundle that is already there is verified again and reused; whatever else is there is replaced. Raises
    BundleError for anything that is not a plain bundle archive, UnpackError where the folder takes nothing;
    nothing stays behind then.
    """
    path = Path(archive)
    with _opened(path) as tar:
        members, bundle_id = _checked(tar, path)
        target = cache_dir / "bundles" / bundle_id
        if (found := _found(target, bundle_id)) is not None:
            return found
        with _staged(tar, members, path, target.parent) as bundle:
            return _move(bundle, target)


class UnpackError(BundleError):
    """The archive may be sound, but the folder where it is to be unpacked is not."""

    #: nothing more can be written where it lies; another place may have room
    full: bool = False


class _BoundedReader:
    """A file whose single reads are bounded: tarfile reads a header's claimed size in one call."""

    def __init__(self, file: BinaryIO, where: Path) -> None:
        self._file = file
        self._where = where

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _CHUNK_BYTES:
            raise BundleError(
                f"{self._where}: a tar header claims {size} bytes; at most {_CHUNK_BYTES} are allowed"
            )
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    """The archive, uncompressed only; every way in which tarfile fails becomes one BundleError."""
    try:
        with open_given(path, error=BundleError, regular=True) as file:
            for magic, name in _COMPRESSED:
                if file.peek(8).startswith(magic):
                    raise BundleError(
                        f"{path}: not a readable .tar: compressed with {name}; decompress it first"
                    )
            reader: Any = _BoundedReader(file, path)
            with tarfile.TarFile.open(fileobj=reader, mode="r:") as tar:
                yield tar
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        raise BundleError(f"{path}: not a readable .tar: {error}") from error
    except OSError as error:
        raise BundleError(f"{path}: {error.strerror or error}") from error


def _members(tar: tarfile.TarFile, path: Path) -> dict[str, tarfile.TarInfo]:
    """Plain files by relative path; folders are skipped, anything else is refused."""
    members: dict[str, tarfile.TarInfo] = {}
    seen = 0
    while (member := tar.next()) is not None:
        seen += 1
        if seen > 2 * MAX_FILES:
            raise BundleError(f"{path}: more than {2 * MAX_FILES} members")
        name = member.name.removeprefix("./")
        if member.isdir():
            continue
        check_relative_path(name, str(path))
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            raise BundleError(f"{path}: {name!r} is not a plain file")
        if name in members:
            raise BundleError(f"{path}: {name!r} appears twice")
        members[name] = member
    return members


def _check_members(members: dict[str, tarfile.TarInfo], manifest: Manifest, path: Path) -> None:
    sizes = {entry.path: entry.size_bytes for entry in manifest.entries}
    for name, member in members.items():
        if name == SIGNATURE_NAME and member.size <= _MAX_SIGNATURE_BYTES:
            continue
        if name != MANIFEST_NAME and sizes.get(name) != member.size:
            raise BundleError(f"{path}: {name!r} of {member.size} bytes is not what {MANIFEST_NAME} lists")
    for name in sizes:
        if name not in members:
            raise BundleError(f"{path}: {name!r} is missing")


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo, limit_bytes: int, path: Path) -> bytes:
    if member.size > limit_bytes:
        raise BundleError(f"{path}: {member.name!r}: {member.size} bytes; at most {limit_bytes} are allowed")
    return b"".join(_chunks(tar, member, path))


def _chunks(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> Iterator[bytes]:
    stream, left_bytes = tar.extractfile(member), member.size
    while left_bytes > 0:
        chunk = stream.read(min(left_bytes, _CHUNK_BYTES // 2)) if stream is not None else b""
        if not chunk:
            raise BundleError(f"{path}: {member.name!r} is truncated")
        left_bytes -= len(chunk)
        yield chunk


def _checked(tar: tarfile.TarFile, path: Path) -> tuple[dict[str, tarfile.TarInfo], str]:
    """The archive's files, which are what its manifest lists, and the bundle's id."""
    members = _members(tar, path)
    if MANIFEST_NAME not in members:
        raise BundleError(f"{path}: holds no {MANIFEST_NAME}")
    manifest = parse_manifest(_read(tar, members[MANIFEST_NAME], MAX_MANIFEST_BYTES, path))
    _check_members(members, manifest, path)
    return members, manifest.bundle_id


@contextmanager
def _staged(
    tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], path: Path, parent: Path
) -> Iterator[Bundle]:
    """The verified bundle in a folder in `parent`, on the disk; what is left there afterwards is removed."""

    def make() -> Path:
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent, STAGING_PREFIX)
        return Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=parent))

    staging = _written(make)
    try:
        with marked(staging):
            for name, member in members.items():
                _extract(tar, member, staging / name, path)
            for folder, _, _ in os.walk(staging):
                sync_folder(Path(folder))
            yield open_bundle(staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, path: Path) -> None:
    """Writes the content only: owner, mode and times of the archive are not taken over."""
    _written(target.parent.mkdir, parents=True, exist_ok=True)
    with _written(target.open, "xb") as out:
        for chunk in _chunks(tar, member, path):
            _written(out.write, chunk)
        # before the rename: a power cut between the two would leave a name and no content
        _written(out.flush)
        _written(os.fsync, out.fileno())


def _written(write: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Calls what writes; a full disk or a missing right is named with the place, not with the archive."""
    try:
        return write(*arguments, **options)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        refused = UnpackError(f"{where}cannot be unpacked: {error.strerror or error}")
        refused.full = error.errno in _FULL
        raise refused from error


def _found(folder: Path, bundle_id: str) -> Bundle | None:
    """That very bundle, if it is there, unharmed; through a link it is not."""
    try:
        if folder.is_symlink() or not folder.is_dir():
            return None
        bundle = open_bundle(folder)
    except (BundleError, OSError):
        return None
    return bundle if bundle.manifest.bundle_id == bundle_id else None


def _move(bundle: Bundle, target: Path) -> Bundle:
    """Puts the folder in its place. Where another process was first, its copy counts if it is sound."""
    try:
        return _placed(bundle, target)
    except UnpackError:
        if (found := _found(target, bundle.manifest.bundle_id)) is not None:
            return found
        remove_any(target)
        return _placed(bundle, target)


def _placed(bundle: Bundle, target: Path) -> Bundle:
    _written(bundle.root.replace, target)
    sync_folder(target.parent)
    return bundle.moved(target.resolve())


def _archive(bundle: Bundle) -> Iterator[bytes]:
    """The bytes of the archive: no owner, no times, the manifest first."""
    sizes = {entry.path: entry.size_bytes for entry in bundle.manifest.entries}
    for name in (MANIFEST_NAME, SIGNATURE_NAME):
        if (bundle.root / name).is_file():
            sizes = {name: (bundle.root / name).stat().st_size, **sizes}
    for name in sorted(sizes, key=lambda name: (name != MANIFEST_NAME, name)):
        info = tarfile.TarInfo(name)
        info.size, info.mode = sizes[name], 0o644
        yield info.tobuf(tarfile.GNU_FORMAT)
        with (bundle.root / name).open("rb") as file:
            left_bytes = info.size
            while chunk := file.read(_CHUNK_BYTES):
                left_bytes -= len(chunk)
                yield chunk
            if left_bytes:
                raise BundleError(f"{bundle.root / name}: its size changed while it was packed")
        yield bytes(-info.size % tarfile.BLOCKSIZE)
    yield bytes(2 * tarfile.BLOCKSIZE)
