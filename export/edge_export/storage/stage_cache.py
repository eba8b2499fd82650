"""Results of stages, kept under a digest of everything that they depend on, so that an export can resume.

    <folder>/entries/<digest>/value     the result: a digest, then tensors and JSON as one safetensors blob
                              files/…   the files that the stage wrote into the bundle
    <folder>/notes/<digest>/value       how far a stage got that was interrupted
                            data        the bytes that it had written by then

A cache is never trusted and never needed: what is truncated, changed or unreadable counts as absent, and what
cannot be written is not kept. Entries appear in one step. The least recently used go when the cache exceeds
its budget. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from edge_reasoner.contract.bundle.manifest import check_relative_path
from edge_reasoner.errors import BundleError
from edge_reasoner.files import (
    is_own,
    marked,
    remove_abandoned,
    remove_any,
    sync_folder,
    write_atomically,
)

T = TypeVar("T")

DEFAULT_BUDGET_BYTES: Final = 20_000_000_000
_CHUNK_BYTES: Final = 1 << 20
_DIGEST_BYTES: Final = 32
#: of one value: states and statistics of the largest models take far less
_MAX_VALUE_BYTES: Final = 4 << 30
_VALUE, _FILES, _DATA = "value", "files", "data"
_DOCUMENT: Final = "document"
_STAGING: Final = ".new-"


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    path: str
    size_bytes: int
    sha256: str


class _Wrapped(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is written beside the tensors: the value's JSON, and the files that belong to it."""

    value: msgspec.Raw
    files: tuple[_File, ...]


class _Absent(Exception):  # noqa: N818 - not an error: the entry counts as absent
    """What was kept cannot be used."""


def digest(*parts: Any) -> str:
    """SHA-256 (hex) of values: plain data, dataclasses, msgspec structs, tensors, nested in any way."""
    return hashlib.sha256(msgspec.json.encode(parts, enc_hook=_fingerprint, order="sorted")).hexdigest()


def _fingerprint(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, torch.Tensor):
        array = value.contiguous().numpy()
        return [str(value.dtype), list(value.shape), hashlib.sha256(array.tobytes()).hexdigest()]
    raise NotImplementedError(f"{type(value).__name__} has no fingerprint")


class StageCache:
    """One export's view of the cache in `folder`; None keeps nothing.

    `salt` is what every result depends on beside its inputs: the code, the libraries, the kind of machine.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        salt: Callable[[], Any] = lambda: None,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
    ) -> None:
        self._root, self._salt, self._budget_bytes = folder, salt, budget_bytes
        self._reused: list[str] = []

    @property
    def reused(self) -> tuple[str, ...]:
        """The stages whose results were found, in their order."""
        return tuple(dict.fromkeys(self._reused))

    def remember(
        self,
        stage: str,
        inputs: Callable[[], Sequence[Any]],
        kind: type[T],
        make: Callable[[Notes], T],
        *,
        folder: Path | None = None,
        files: Callable[[T], Iterable[str]] = lambda value: (),
    ) -> T:
        """The result of `stage` for these inputs: the kept one, or what `make` returns, which is then kept.

        `kind` is a frozen dataclass that msgspec can decode, but for its tensors. `files` are what the stage
        wrote below `folder`; they are there afterwards either way. `make` may leave notes on how far it is.
        """
        if self._root is None:
            return make(Notes(None))
        key = digest(stage, self._salt(), inputs())
        entry = self._root / "entries" / key
        try:
            value = self._read(entry, kind, folder)
        except (_Absent, OSError):
            notes = Notes(self._root / "notes" / key)
            value = make(notes)
            self._keep(entry, value, folder, tuple(files(value)))
            notes.clear()
        else:
            self._reused.append(stage)
            _touch(entry)
        return value

    def _read(self, entry: Path, kind: type[T], folder: Path | None) -> T:
        value, files = _load(entry / _VALUE, kind)
        for file in files:
            if folder is None:
                raise _Absent
            _copy_checked(entry / _FILES / file.path, folder / file.path, file)
        return value

    def _keep(self, entry: Path, value: Any, folder: Path | None, files: tuple[str, ...]) -> None:
        """Writes an entry beside its final place and renames it; a full or read-only disk keeps nothing."""
        staging: Path | None = None
        try:
            entry.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            remove_abandoned(entry.parent, _STAGING)
            staging = Path(tempfile.mkdtemp(dir=entry.parent, prefix=_STAGING))
            with marked(staging):
                listed = []
                for path in files:
                    assert folder is not None, path
                    listed.append(_copy_synced(folder / path, staging / _FILES / path, path))
                write_atomically(staging / _VALUE, _dump(value, tuple(listed)))
                size_bytes = _size_bytes(staging)
                if size_bytes > self._budget():
                    return
                remove_any(entry)  # what was there could not be read
                sync_folder(staging)
                staging.replace(entry)
                sync_folder(entry.parent)
            self._evict(self._budget(), keep=entry)
        except OSError:
            return
        finally:
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)

    def _budget(self) -> int:
        """At most half of what the disk could give to the cache."""
        assert self._root is not None
        free_bytes = shutil.disk_usage(self._root).free
        return min(self._budget_bytes, (free_bytes + _size_bytes(self._root)) // 2)

    def _evict(self, budget_bytes: int, keep: Path) -> None:
        """Removes what was not used for the longest time until the rest fits."""
        assert self._root is not None
        found = []
        for kind in ("entries", "notes"):
            folder = self._root / kind
            for path in folder.iterdir() if folder.is_dir() else ():
                staged = path.name.startswith(_STAGING)  # by another export, this moment
                if path.is_dir() and not path.is_symlink() and path != keep and not staged:
                    found.append((path.stat().st_mtime_ns, path.name, path, _size_bytes(path)))
        total = _size_bytes(keep) + sum(row[3] for row in found)
        for _, _, path, size_bytes in sorted(found):
            if total <= budget_bytes:
                break
            shutil.rmtree(path, ignore_errors=True)
            total -= size_bytes


@dataclass
class Notes:
    """How far an interrupted stage got: the bytes that it had written, and a value that says the rest.

    Each note replaces the one before. In `folder` None nothing is noted.
    """

    folder: Path | None
    _hash: Any = field(default_factory=hashlib.sha256)
    _noted_bytes: int = 0

    def resume(self, data_path: Path, kind: type[T]) -> T | None:
        """The last note, and at `data_path` the bytes written until then; None where there is none."""
        if self.folder is None:
            return None
        try:
            value, (file,) = _load(self.folder / _VALUE, kind)
            _copy_checked(self.folder / _DATA, data_path, file)
        except (_Absent, OSError, ValueError):
            return None
        with data_path.open("rb") as stream:
            self._advance(stream, file.size_bytes)
        return value

    def note(self, data_path: Path, value: Any) -> None:
        """Notes `value` and what `data_path` has gained since the last note. A failure ends the noting."""
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            mode = "r+b" if self._noted_bytes else "wb"
            with data_path.open("rb") as stream, (self.folder / _DATA).open(mode) as out:
                stream.seek(self._noted_bytes)
                out.seek(self._noted_bytes)
                self._advance(stream, os.fstat(stream.fileno()).st_size - self._noted_bytes, out)
                out.flush()
                os.fsync(out.fileno())
            written = _File(_DATA, self._noted_bytes, self._hash.copy().hexdigest())
            write_atomically(self.folder / _VALUE, _dump(value, (written,)))
        except OSError:
            self.clear()
            self.folder = None

    def clear(self) -> None:
        """Forgets all notes: the stage has finished."""
        if self.folder is not None:
            remove_any(self.folder)

    def _advance(self, stream: Any, count_bytes: int, out: Any = None) -> None:
        while count_bytes > 0 and (chunk := stream.read(min(_CHUNK_BYTES, count_bytes))):
            self._hash.update(chunk)
            self._noted_bytes += len(chunk)
            count_bytes -= len(chunk)
            if out is not None:
                out.write(chunk)


def _dump(value: Any, files: tuple[_File, ...]) -> bytes:
    """A digest, then a safetensors blob of the tensors in `value` and of the JSON of everything else."""
    tensors: dict[str, torch.Tensor] = {}

    def place(found: Any) -> Any:
        if isinstance(found, Mapping):
            return dict(found)
        if not isinstance(found, torch.Tensor):
            raise NotImplementedError(f"{type(found).__name__} cannot be kept")
        name = str(len(tensors))
        tensors[name] = found.detach().clone(memory_format=torch.contiguous_format)
        return name

    document = msgspec.Raw(msgspec.json.encode(value, enc_hook=place))
    text = bytearray(msgspec.json.encode(_Wrapped(document, files)))
    blob: bytes = save_tensors({**tensors, _DOCUMENT: torch.frombuffer(text, dtype=torch.uint8)})
    return hashlib.sha256(blob).digest() + blob


def _load(path: Path, kind: type[T]) -> tuple[T, tuple[_File, ...]]:
    """The inverse of `_dump`. Raises _Absent for anything else, OSError where there is no such file."""
    with _open_plain(path) as stream:
        if os.fstat(stream.fileno()).st_size > _MAX_VALUE_BYTES:
            raise _Absent
        expected, blob = stream.read(_DIGEST_BYTES), stream.read()
    if hashlib.sha256(blob).digest() != expected:
        raise _Absent
    try:
        tensors = load_tensors(blob)
        wrapped = msgspec.json.decode(tensors[_DOCUMENT].numpy().tobytes(), type=_Wrapped)

        def tensor(wanted: type, found: Any) -> Any:
            if wanted is not torch.Tensor:
                raise NotImplementedError(f"{wanted.__name__} cannot be kept")
            return tensors[found]

        value = msgspec.json.decode(wrapped.value, type=kind, dec_hook=tensor)
        for file in wrapped.files:
            check_relative_path(file.path, "files")
    except (SafetensorError, msgspec.MsgspecError, ValueError, KeyError, TypeError, BundleError) as error:
        raise _Absent from error
    return value, wrapped.files


def _open_plain(path: Path) -> BinaryIO:
    """Opens a regular file of this user for reading, through no link. Raises _Absent for others, OSError."""
    flags = (
        os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    descriptor = os.open(path, flags)
    if not is_own(os.fstat(descriptor)):
        os.close(descriptor)
        raise _Absent
    return os.fdopen(descriptor, "rb")


def _copy_checked(source: Path, target: Path, file: _File) -> None:
    """Copies the first bytes of `source`, as listed. Raises _Absent, leaving nothing, if they are others."""
    target.parent.mkdir(parents=True, exist_ok=True)
    hashed, left_bytes = hashlib.sha256(), file.size_bytes
    try:
        with _open_plain(source) as stream, target.open("wb") as out:
            while left_bytes > 0 and (chunk := stream.read(min(_CHUNK_BYTES, left_bytes))):
                hashed.update(chunk)
                out.write(chunk)
                left_bytes -= len(chunk)
        if left_bytes > 0 or hashed.hexdigest() != file.sha256:
            raise _Absent
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _copy_synced(source: Path, target: Path, name: str) -> _File:
    target.parent.mkdir(parents=True, exist_ok=True)
    hashed, size_bytes = hashlib.sha256(), 0
    with source.open("rb") as stream, target.open("xb") as out:
        while chunk := stream.read(_CHUNK_BYTES):
            hashed.update(chunk)
            out.write(chunk)
            size_bytes += len(chunk)
        out.flush()
        os.fsync(out.fileno())
    return _File(name, size_bytes, hashed.hexdigest())


def _size_bytes(folder: Path) -> int:
    """Bytes of all files below a folder; what vanishes meanwhile counts nothing."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            total += status.st_size if stat.S_ISREG(status.st_mode) else 0
    return total


def _touch(path: Path) -> None:
    """Marks an entry as used now; a read-only cache cannot be marked."""
    with contextlib.suppress(OSError):
        os.utime(path)
