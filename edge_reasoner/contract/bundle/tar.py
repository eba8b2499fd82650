"""A bundle as one uncompressed `.tar`: packed for transport, unpacked into a cache folder before it runs.

Nothing in the archive is trusted: only plain files with plain relative paths, each listed in the manifest
with exactly its size; no links, devices, sparse files, duplicates or compression; reads are bounded, so a
header that claims gigabytes is refused before any memory is taken.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from edge_reasoner.contract.bundle.manifest import (
    MANIFEST_NAME,
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    Manifest,
    check_relative_path,
    parse_manifest,
)
from edge_reasoner.contract.bundle.open import SIGNATURE_NAME, Bundle, Progress, open_bundle
from edge_reasoner.errors import BundleError

_CHUNK_BYTES = 1 << 20
_MAX_SIGNATURE_BYTES = 64 * 1024


def unpack_bundle(archive: str | os.PathLike[str], cache_dir: Path) -> Path:
    """Unpacks a bundle `.tar` to `cache_dir/bundles/<bundle_id>` and returns that folder, fully verified.

    A bundle that is already there is verified again and reused. Raises BundleError for anything that is not a
    plain bundle archive; nothing stays behind then.
    """
    path = Path(archive)
    with _opened(path) as tar:
        members = _members(tar, path)
        if MANIFEST_NAME not in members:
            raise BundleError(f"{path}: holds no {MANIFEST_NAME}")
        manifest = parse_manifest(_read(tar, members[MANIFEST_NAME], MAX_MANIFEST_BYTES, path))
        _check_members(members, manifest, path)
        target = cache_dir / "bundles" / manifest.bundle_id
        if target.is_dir():
            return open_bundle(target).root
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".unpack-", dir=target.parent))
        try:
            for name, member in members.items():
                _extract(tar, member, staging / name, path)
            open_bundle(staging)
            _rename(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return target


def open_bundle_or_tar(
    path: str | os.PathLike[str],
    cache_dir: Path,
    verify: Literal["full", "sizes"] = "full",
    *,
    progress: Progress | None = None,
) -> Bundle:
    """`open_bundle` for a directory; a `.tar` is unpacked to `cache_dir` first. Raises BundleError."""
    if Path(path).is_file():
        return open_bundle(unpack_bundle(path, cache_dir), "sizes")  # unpacking has just hashed everything
    return open_bundle(path, verify, progress=progress)


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
        with path.open("rb") as file:
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


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path, path: Path) -> None:
    """Writes the content only: owner, mode and times of the archive are not taken over."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as out:
        for chunk in _chunks(tar, member, path):
            out.write(chunk)


def _rename(staging: Path, target: Path) -> None:
    try:
        staging.replace(target)
    except OSError:
        # another process unpacked the same bundle first: its copy counts, once verified
        if not target.is_dir():
            raise
        open_bundle(target)
