"""Files of a bundle that stay the ones that were checked.

A bundle's folder is opened once and held; everything in it is opened below that descriptor, through no link,
so that a folder or file put in its place later is not looked at. Small files are read and compared with the
manifest's digest at every use. Weights are too large for that: they are told by what the file system says of
them (device, inode, size, times), before and after the runtime has read them, and are looked at again before
each call of an open model.
"""

from __future__ import annotations

import hashlib
import os
import stat
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final, TypeVar

import msgspec

from edge_reasoner.errors import BundleError

T = TypeVar("T")

_BY_DESCRIPTOR: Final = os.open in os.supports_dir_fd and os.scandir in os.supports_fd
_FLAGS: Final = (
    os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)
#: how often a graph is loaded anew when its folder was changed meanwhile: another process may mark it as used
_LOADS: Final = 3


class Identity(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """What tells a file from any other, and from itself before it was written to. `changed_ns` cannot be set
    by hand, as `modified_ns` can."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> Identity:
        """The identity of what has this status."""
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class HeldFolder:
    """A folder, held open where the system can open files below a descriptor (elsewhere by its path)."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        """`path` as it is shown. `descriptor` is taken over, and closed with this object; None: it is opened,
        which raises BundleError."""
        self.path = path
        if descriptor is None and _BY_DESCRIPTOR:
            descriptor = _opened(path, path, _FLAGS | os.O_DIRECTORY, None)
        self.descriptor = descriptor
        if descriptor is not None:
            # at the interpreter's end the system closes it
            weakref.finalize(self, os.close, descriptor).atexit = False

    def at(self, path: Path) -> HeldFolder:
        """The same folder, which was moved to `path`."""
        return HeldFolder(path, None if self.descriptor is None else os.dup(self.descriptor))

    @property
    def location(self) -> str:
        """A path that leads into this very folder, whatever is at its old place by now, where there is /proc;
        elsewhere the old place."""
        held = f"/proc/self/fd/{self.descriptor}"
        return held if self.descriptor is not None and Path(held).is_dir() else str(self.path)

    def open(self, relative: str) -> BinaryIO:
        """A regular file for reading, reached through no link. Raises BundleError."""
        *folders, name = relative.split("/")
        parent = self.folder("/".join(folders)) if folders else self
        where = self.path / relative
        # without O_NONBLOCK, opening a pipe would wait for its other end
        flags = _FLAGS | getattr(os, "O_NONBLOCK", 0)
        descriptor = _opened(parent.path / name, where, flags, parent.descriptor)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise BundleError(f"{where}: not a regular file")
        return os.fdopen(descriptor, "rb")

    def folder(self, relative: str) -> HeldFolder:
        """A folder below this one ("": this one). Raises BundleError."""
        found = self
        for name in relative.split("/") if relative else ():
            path = found.path / name
            if found.descriptor is None:
                found = HeldFolder(path)
            else:
                found = HeldFolder(path, _opened(path, path, _FLAGS | os.O_DIRECTORY, found.descriptor))
        return found

    def scan(self) -> Iterator[os.DirEntry[str]]:
        """What is in this folder. Raises OSError."""
        with os.scandir(self.path if self.descriptor is None else self.descriptor) as items:
            yield from items

    def read(self, relative: str, limit_bytes: int) -> bytes:
        """A file's content. Raises BundleError: as `open`, or larger than `limit_bytes`."""
        with self.open(relative) as file:
            data = _read(file, limit_bytes + 1, relative)
        if len(data) > limit_bytes:
            raise BundleError(f"{relative}: larger than the {limit_bytes} bytes allowed")
        return data

    def identity(self) -> Identity:
        """Changes when anything in the folder (not below its folders) is made, renamed or removed."""
        return Identity.of(self.path.stat() if self.descriptor is None else os.fstat(self.descriptor))


def _opened(path: Path, where: Path, flags: int, below: int | None) -> int:
    try:
        return os.open(path, flags) if below is None else os.open(path.name, flags, dir_fd=below)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BundleError(f"{where}: {reason}") from error


def _read(file: BinaryIO, count_bytes: int, where: str) -> bytes:
    try:
        return file.read(count_bytes)
    except OSError as error:
        raise BundleError(f"{where}: cannot be read: {error.strerror or error}") from error


def read_checked(folder: HeldFolder, relative: str, size_bytes: int, sha256: str) -> bytes:
    """A file's content, which has exactly that size and digest. Raises BundleError."""
    with folder.open(relative) as file:
        data = _read(file, size_bytes + 1, relative)
    if len(data) != size_bytes:
        raise BundleError(f"{relative}: its size changed since the bundle was opened")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BundleError(f"{relative}: its content does not match the manifest's SHA-256")
    return data


class HeldFile:
    """A file, held open, that was seen before with that identity. Closed with this object."""

    def __init__(self, folder: HeldFolder, relative: str, seen: Identity) -> None:
        """Raises BundleError where another file is there by now, or the same with a change."""
        self.name = relative
        self._file = folder.open(relative)
        self._seen = seen
        if Identity.of(os.fstat(self._file.fileno())) != seen:
            raise self._changed()

    def check(self) -> None:
        """Raises BundleError if the file was written to or cut since. A microsecond, and no protection from
        one who does it right now."""
        status = os.fstat(self._file.fileno())
        if status.st_mtime_ns != self._seen.modified_ns or status.st_size != self._seen.size_bytes:
            raise self._changed()

    def read_at(self, offset: int, count_bytes: int) -> bytes:
        """Some bytes. Raises BundleError."""
        self._file.seek(offset)
        return _read(self._file, count_bytes, self.name)

    @property
    def size_bytes(self) -> int:
        """The size it was seen with."""
        return self._seen.size_bytes

    def is_still(self, folder: HeldFolder) -> bool:
        """Whether its name leads to it, unchanged."""
        try:
            with folder.open(self.name) as file:
                return Identity.of(os.fstat(file.fileno())) == self._seen
        except BundleError:
            return False

    def _changed(self) -> BundleError:
        return BundleError(f"{self.name}: changed since the bundle was opened; open the bundle again")


@dataclass(frozen=True)
class HeldGraph:
    """A graph that was checked: its bytes, and its weights, which are not in memory."""

    #: where it lies, to be shown, and for a runtime that must read the file by itself
    path: Path
    data: bytes
    #: the bundle's folder, and the graph's in it
    root: HeldFolder
    folder: HeldFolder
    #: named by their paths in the bundle
    weights: tuple[HeldFile, ...]

    def check(self) -> None:
        """Raises BundleError if a file of weights was written to or cut since it was checked."""
        for file in self.weights:
            file.check()

    def load(self, read: Callable[[], T], *, by_name: bool = False) -> T:
        """What `read` returns, which opens the weights by their names in `folder`: those that were checked.

        With `by_name` it opens the graph so, too. Raises BundleError where they are not, or did not stay,
        under their names.
        """
        for _ in range(_LOADS):
            before = self._folders()
            self._check_names(by_name)
            result = read()
            self._check_names(by_name)
            if self._folders() == before:
                return result
            del result
        raise BundleError(f"{self.folder.path}: is being changed while the bundle is opened")

    def _check_names(self, graph_too: bool) -> None:
        if graph_too and self.folder.read(self.path.name, len(self.data)) != self.data:
            raise BundleError(f"{self.path.name}: changed since the bundle was opened; open the bundle again")
        for file in self.weights:
            if not file.is_still(self.root):
                raise BundleError(f"{file.name}: changed since the bundle was opened; open the bundle again")

    def _folders(self) -> list[Identity]:
        """Of the graph's folder, and of those between it and its weights."""
        places = {""}
        base = self.folder.path.relative_to(self.root.path).as_posix()
        base = "" if base == "." else base
        for file in self.weights:
            parts = file.name.removeprefix(f"{base}/" if base else "").split("/")[:-1]
            places.update("/".join(parts[:depth]) for depth in range(1, len(parts) + 1))
        return [self.folder.folder(place).identity() for place in sorted(places)]
