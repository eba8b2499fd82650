"""Small files of strangers, read; our own files, written in one step.

Text is UTF-8. A byte order mark at its start is skipped, CRLF is fine; UTF-16 and UTF-32 (what PowerShell's
`>` and some editors write) are recognized and refused by name, with the command that converts them. Every
reader is bounded and raises `error`, the caller's own class of our error tree, in one line.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import glob
import io
import json
import os
import select
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from edge_reasoner.errors import EdgeReasonerError, InputError, one_line

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_ROWS = 1_000_000
#: of a file of rows: all of them are kept
MAX_ROWS_BYTES = 1 << 30
_CHUNK_BYTES = 1 << 20
#: how long a pipe is waited for
_SILENCE_S = 30.0
_KINDS = (stat.S_IFREG, stat.S_IFIFO)
_OTHERS = {
    stat.S_IFDIR: "it is a directory,",
    stat.S_IFCHR: "it is a device,",
    stat.S_IFBLK: "it is a device,",
    stat.S_IFSOCK: "it is a socket,",
    stat.S_IFIFO: "it is a pipe,",
}
#: what is looked at to tell UTF-16 without a byte order mark from UTF-8
_HEAD_BYTES = 512
_BOM = "\ufeff"
_NEW_MODE = 0o644
#: something empty and younger may have been made this instant, and not yet be held
_YOUNG_S = 3600.0
#: what `tempfile` puts between prefix and suffix
_RANDOM = "[a-z0-9_]" * 8
#: longest first: UTF-32's little-endian mark begins with UTF-16's
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

ErrorType = type[EdgeReasonerError]


def write_atomically(path: Path, data: bytes | Iterable[bytes], *, follow: bool = True) -> None:
    """Makes or replaces the file in one step: a reader, or a power cut, meets the old one or the new one.

    The parts of `data` go to a temporary file in the same folder (which must exist), are synced to the disk
    and renamed. On any failure the temporary file is removed and `path` is as it was; one that a killed
    process left for the same `path` is removed too. A symlink stays one:
    what it points to is written. What is no file (`/dev/null`, a pipe) is written to, never replaced. Without
    `follow`, meant for files that only this program writes, either is replaced. Raises OSError.
    """
    path = Path(os.path.realpath(path)) if follow else path
    if follow and path.exists() and not (path.is_file() or path.is_dir()):
        with path.open("wb") as device:
            device.writelines((data,) if isinstance(data, bytes) else data)
        return
    prefix = f".{path.name[:80]}."
    remove_abandoned(path.parent, prefix, ".tmp")
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".tmp")
    temporary = Path(name)
    try:
        with _held_beyond_its_end(handle):
            with os.fdopen(handle, "wb") as file:
                file.writelines((data,) if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(_mode_of(path) if follow else _NEW_MODE)
            temporary.replace(path)
        sync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk, so that a rename outlives a power cut; where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_any(path: Path) -> None:
    """Removes a folder with all in it, a file or a link; what cannot be removed stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def is_own(status: os.stat_result) -> bool:
    """Whether a regular file of a cache was written by this user or the system, and by nobody else."""
    owners = (0, os.geteuid()) if hasattr(os, "geteuid") else (status.st_uid,)
    ours = status.st_uid in owners and not (status.st_mode & stat.S_IWOTH and os.name == "posix")
    return stat.S_ISREG(status.st_mode) and ours


def read_own(path: Path, limit_bytes: int) -> bytes | None:
    """A file of a cache, as `is_own` says; None where there is none, it is a link or larger than allowed."""
    try:
        with open(path, "rb", opener=_open_plainly) as file:
            if not is_own(os.fstat(file.fileno())):
                return None
            data = file.read(limit_bytes + 1)
    except (OSError, ValueError):
        return None
    return data if len(data) <= limit_bytes else None


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Marks a file or folder as in use by this process, until the block or the process ends, however.

    Raises OSError where another holds it. Without locks (Windows) nothing is marked.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def marked(path: Path) -> Iterator[None]:
    """As `held`, where the disk has locks; where it has none, what a killed process leaves will stay."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(held(path))
        yield


def remove_abandoned(
    parent: Path, prefix: str, suffix: str = "", *, now: Callable[[], float] = time.time
) -> None:
    """Removes this user's files and folders in `parent` that no process holds: whoever made them was killed.

    Meant are names as `tempfile` gives them: prefix, eight letters, suffix. What cannot be removed stays.
    """
    if fcntl is None:
        return  # without locks nobody can tell
    with contextlib.suppress(OSError):
        for left in parent.glob(f"{glob.escape(prefix)}{_RANDOM}{glob.escape(suffix)}"):
            with contextlib.suppress(OSError):
                _remove_unheld(left, now())


def _remove_unheld(left: Path, now_s: float) -> None:
    status = left.lstat()
    is_folder = stat.S_ISDIR(status.st_mode)
    if not (is_folder or stat.S_ISREG(status.st_mode)) or status.st_uid != os.geteuid():
        return
    with held(left):
        empty = not any(left.iterdir()) if is_folder else status.st_size == 0
        if empty and now_s - status.st_mtime < _YOUNG_S:
            return
        if is_folder:
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()


@contextmanager
def _held_beyond_its_end(handle: int) -> Iterator[None]:
    """As `held`, for an open file that is closed within the block; where a disk has no locks, nothing."""
    if fcntl is None:
        yield
        return
    handle = os.dup(handle)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def open_standard_streams() -> None:
    """Opens onto nothing what the caller closed of standard input, output and error (`>&-`): the next file
    that is opened would get its number, and what is printed would end in it."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, os.O_RDWR)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, os.fdopen(number, mode, closefd=False))


def utf8_path(path: Path, *, error: ErrorType = InputError) -> str:
    """The path for a library that takes UTF-8 only, whatever the locale made of it. Raises `error`: its bytes
    are not UTF-8."""
    try:
        return os.fsencode(path).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(
            f"{path}: the name is not UTF-8, which what reads this file needs; rename it"
        ) from problem


def exists(path: Path) -> bool:
    """Whether anything is at `path`. What cannot be looked at (a name too long, a folder without the right to
    enter it) is not there for us: whoever needs it says so in its own words."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether a regular file, or a link to one, is at `path`; otherwise as `exists`."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


class _Pipe(io.RawIOBase):
    """The reading end of a pipe: one into which nobody writes is empty, one that is silent gives up."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor  # without a writer, waiting for one would never end: it does not block
        self._poll = select.poll()
        self._poll.register(descriptor, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            try:
                data = os.read(self._descriptor, len(buffer))
            except BlockingIOError:
                if not self._poll.poll(_SILENCE_S * 1000):
                    silence = f"a pipe into which nothing was written for {_SILENCE_S:g} s"
                    raise TimeoutError(errno.ETIMEDOUT, silence) from None
                continue
            buffer[: len(data)] = data
            return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()


def open_given(
    path: Path, limit_bytes: int | None = None, *, error: ErrorType = InputError, regular: bool = False
) -> io.BufferedReader:
    """Opens for reading what a user names: a file, or a pipe that somebody writes into; never waits for one.

    Raises `error`: missing or unreadable, a folder, a device (`/dev/zero` has no end), a file of more than
    `limit_bytes` (who reads a pipe counts); with `regular` also a pipe.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as problem:
        raise error(f"{path}: cannot be read: {getattr(problem, 'strerror', None) or problem}") from problem
    try:
        status = os.fstat(descriptor)
        kind = stat.S_IFMT(status.st_mode)
        if kind not in _KINDS or (regular and kind != stat.S_IFREG):
            raise error(f"{path}: cannot be read: {_OTHERS.get(kind, 'it is')} not a regular file")
        if kind == stat.S_IFREG and limit_bytes is not None and status.st_size > limit_bytes:
            raise error(f"{path}: larger than the {limit_bytes} bytes that are allowed")
    except BaseException:
        os.close(descriptor)
        raise
    if kind == stat.S_IFIFO:
        return io.BufferedReader(_Pipe(descriptor))
    return os.fdopen(descriptor, "rb")


def read_bytes(
    path: Path, limit_bytes: int, *, error: ErrorType = InputError, regular: bool = False
) -> bytes:
    """The whole file. Raises `error` as `open_given`, and above the limit. `regular`: for the folder of a
    stranger, where a pipe would never end."""
    data = bytearray()
    with open_given(path, limit_bytes, error=error, regular=regular) as file:
        try:
            # read() allocates what it is asked for, so it is asked for little at a time
            while len(data) <= limit_bytes and (chunk := file.read(min(_CHUNK_BYTES, limit_bytes + 1))):
                data += chunk
        except OSError as problem:
            raise error(f"{path}: cannot be read: {problem.strerror or problem}") from problem
    if len(data) > limit_bytes:
        raise error(f"{path}: larger than the {limit_bytes} bytes that are allowed")
    return bytes(data)


def decode_text(data: bytes, where: str, *, error: ErrorType = InputError) -> str:
    """`data` as UTF-8, without a byte order mark. Raises `error` naming another encoding or the first bad
    byte."""
    if encoding := foreign_encoding(data):
        raise error(
            f"{where}: {encoding} text, UTF-8 is needed; convert it: iconv -f {encoding} -t UTF-8"
            " (PowerShell: Set-Content -Encoding utf8)"
        )
    try:
        return data.decode("utf-8").lstrip(_BOM)
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 at byte {problem.start}") from problem


def foreign_encoding(data: bytes) -> str | None:
    """The name of the encoding, if `data` begins like UTF-16 or UTF-32 text, with its mark or without."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    head = data[:_HEAD_BYTES]
    if b"\0" not in head or len(head) < 4:
        return None
    lanes = [head[start::4] for start in range(4)]
    empty = "".join("0" if lane.count(0) > 0.6 * len(lane) else "x" for lane in lanes)
    # mostly Latin text: the high bytes of each unit are zero
    names = {"x0x0": "UTF-16LE", "0x0x": "UTF-16BE", "x000": "UTF-32LE", "000x": "UTF-32BE"}
    return names.get(empty)


def read_text(path: Path, limit_bytes: int, *, error: ErrorType = InputError, regular: bool = False) -> str:
    """A text file; raises `error` as `read_bytes` and `decode_text` do."""
    return decode_text(read_bytes(path, limit_bytes, error=error, regular=regular), str(path), error=error)


def parse_json(
    data: bytes | str,
    where: str,
    *,
    error: ErrorType = InputError,
    allow_nan: bool = False,
) -> Any:
    """The JSON value of a text, however deep or long its numbers: raises `error` for what is not JSON.

    `allow_nan` takes NaN, Infinity and -Infinity, which Python and others write though JSON has no such
    numbers. The last of two equal keys counts; numbers too large for a float become infinite; lone surrogates
    (`"\\ud800"`) are kept.
    """
    text = decode_text(data, where, error=error) if isinstance(data, bytes) else data.lstrip(_BOM)
    refuse_nan: Callable[[str], Any] | None = None if allow_nan else _refuse_constant
    try:
        return json.loads(text, parse_constant=refuse_nan)
    except RecursionError as problem:
        raise error(f"{where}: not JSON: nested too deeply") from problem
    except ValueError as problem:  # JSONDecodeError, numbers of too many digits, our own
        raise error(f"{where}: not JSON: {one_line(problem)}") from problem


def read_json(
    path: Path,
    limit_bytes: int,
    *,
    error: ErrorType = InputError,
    regular: bool = False,
    allow_nan: bool = False,
) -> Any:
    """A JSON file's value; raises `error` as `read_bytes` and `parse_json` do."""
    data = read_bytes(path, limit_bytes, error=error, regular=regular)
    return parse_json(data, str(path), error=error, allow_nan=allow_nan)


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line's number (from 1) and object of a JSONL file; blank lines are skipped.

    A byte order mark is skipped where a line begins: joined files have one in the middle. Raises InputError:
    no such file, a line that is too long, not UTF-8, not JSON or not an object, too many rows, or none.
    """
    count = 0
    left_bytes = MAX_ROWS_BYTES
    with open_given(path, MAX_ROWS_BYTES) as file:
        try:
            head = file.peek(_HEAD_BYTES)
            if foreign_encoding(head):
                decode_text(head, str(path))  # raises, with the encoding's name
            number = 0
            while data := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                left_bytes -= len(data)
                if len(data) > MAX_LINE_BYTES:
                    raise InputError(f"{path} line {number}: more than {MAX_LINE_BYTES} bytes")
                if left_bytes < 0:
                    raise InputError(f"{path}: more than {MAX_ROWS_BYTES} bytes")
                text = decode_text(data, f"{path} line {number}").strip()
                if not text:
                    continue
                count += 1
                if count > MAX_ROWS:
                    raise InputError(f"{path}: more than {MAX_ROWS} rows")
                yield number, _object(text, f"{path} line {number}")
        except OSError as error:
            raise InputError(f"{path}: {error.strerror or error}") from error
    if count == 0:
        raise InputError(f"{path}: no rows; one JSON object per line is needed")


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        row = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        row = parse_json(text, where, allow_nan=True)
        if not is_unicode(row):
            raise InputError(f"{where}: a lone surrogate (half a character, as \\ud800) in it") from None
    if not isinstance(row, dict):
        raise InputError(f"{where}: a {type(row).__name__}; each line must be a JSON object")
    return row


def is_unicode(value: object) -> bool:
    """Whether a JSON value can be written as UTF-8: no lone surrogate is in it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _mode_of(path: Path) -> int:
    """The permissions that the file has, or those of a new file that anybody may read."""
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError:
        return _NEW_MODE


def _open_plainly(path: str, flags: int) -> int:
    """Neither waiting nor through a link."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
