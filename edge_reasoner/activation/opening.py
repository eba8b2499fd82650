"""Opening a bundle where it is: a directory as it stands, a `.tar` unpacked into the cache first.

Everything that takes a bundle's path opens it here. Unpacked bundles are kept by content, so that the next
start only verifies; the oldest go when they become many.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from edge_reasoner.contract.bundle.open import Bundle, ByteProgress, open_bundle
from edge_reasoner.errors import BundleError
from edge_reasoner.files import is_file, marked, remove_abandoned

#: unpacked bundles together, apart from the one that is being opened
MAX_UNPACKED_BYTES = 8_000_000_000
#: what was used that recently may be in use by another process
_SPARED_S = 3600.0
#: how temporary folders begin, for bundles that no cache can take
_TEMPORARY = "edge-reasoner-unpacked."


def open_bundle_at(
    path: str | os.PathLike[str],
    cache_dir: Path | None,
    verify: Literal["full", "sizes"] = "full",
    *,
    progress: ByteProgress | None = None,
    max_unpacked_bytes: int = MAX_UNPACKED_BYTES,
    now: Callable[[], float] = time.time,
) -> Bundle:
    """`open_bundle` for a directory, and for a bundle as one `.tar` file.

    The archive is unpacked to `cache_dir/bundles/<bundle_id>`, or found there; without a cache, or with one
    that cannot be written, to a temporary folder that is removed when the process ends. It is verified in
    full either way, and what is not sound in the cache is replaced. Raises BundleError.
    """
    if not is_file(Path(path)):
        return open_bundle(path, verify, progress=progress)
    # tarfile is not imported by a process that opens a directory
    from edge_reasoner.contract.bundle.tar import UnpackError, unpack_bundle

    if cache_dir is None:
        return unpack_bundle(path, _temporary_folder())
    try:
        bundle = unpack_bundle(path, cache_dir)
    except UnpackError as error:
        if error.full:  # a temporary folder is often in memory
            raise
        return unpack_bundle(path, _temporary_folder())
    with contextlib.suppress(OSError):
        os.utime(bundle.root, (now(), now()))
    _evict(bundle.root, max_unpacked_bytes, now())
    return bundle


def _temporary_folder() -> Path:
    try:
        remove_abandoned(Path(tempfile.gettempdir()), _TEMPORARY)
        folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY))
    except OSError as error:
        raise BundleError(
            f"a .tar needs a place to be unpacked to, and there is none: {error.strerror or error};"
            " set EDGE_REASONER_CACHE, or unpack it and give the directory"
        ) from error
    mark = contextlib.ExitStack()
    mark.enter_context(marked(folder))
    atexit.register(_remove, folder, os.getpid(), mark)
    return folder


def _remove(folder: Path, pid: int, mark: contextlib.ExitStack) -> None:
    if pid == os.getpid():  # the end of a forked child is not its parent's
        shutil.rmtree(folder, ignore_errors=True)
    mark.close()


def _evict(used: Path, limit_bytes: int, now_s: float) -> None:
    """Removes the bundles that were not used for the longest time, and what interrupted unpackings left."""
    ages: list[tuple[float, Path]] = []
    with contextlib.suppress(OSError):
        for folder in used.parent.iterdir():
            if folder != used and folder.is_dir() and not folder.is_symlink():
                ages.append((now_s - folder.stat().st_mtime, folder))
    kept_bytes = 0
    for age_s, folder in sorted(ages):
        kept_bytes += _size_bytes(folder)
        unfinished = folder.name.startswith(".")
        if age_s > _SPARED_S and (unfinished or kept_bytes > limit_bytes):
            shutil.rmtree(folder, ignore_errors=True)


def _size_bytes(folder: Path) -> int:
    total_bytes = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total_bytes += (Path(place) / name).lstat().st_size
    return total_bytes
