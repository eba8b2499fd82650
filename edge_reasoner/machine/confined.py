"""Runs a piece of this package in a child process that may hang, crash or take memory without harm to us.

The child has its own session, so that Ctrl-C reaches only the parent, which ends it; a limit on memory, time
and files; and it does not outlive its parent. It says two things through a pipe: that it has started, before
it touches anything of a stranger, and its answer, of bounded length. What it prints is not shown but for the
last line, when it fails.

Where the time limit is over or the memory is too much it is killed. Its memory is what is not backed by a
file: pages of mapped weights can be dropped by the system at any time.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edge_reasoner.errors import one_line

#: most that is read of an answer and of the error output; more answer is a failure, more output is dropped
MAX_SAID_BYTES = 64 * 1024
#: most of a request: it is an argument of the child's command line
MAX_REQUEST_BYTES = 96 * 1024
#: between looks at time and memory
_LOOK_S = 0.02
_READY = b"ready "
_START_S = 120.0
#: between the signal that says that the CPU time is over, and the one that cannot be taken for another
_GRACE_S = 2
_PR_SET_PDEATHSIG = 1
_BOOT = """import sys
sys.path[:] = {paths!r}
from {module} import {function}
{function}({answer}, {parent}, sys.argv[1])
"""


class NoChildError(Exception):
    """No child process could be started, or it is none of ours: nothing is known about what it was to do."""


class ConfinedError(Exception):
    """The child failed. The message, one line, says how: a signal, a limit, or what it said last."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the child may use. None: no such limit."""

    #: from its start on
    wall_s: float
    #: CPU time of all its threads
    cpu_s: float
    #: memory in use that no file backs
    memory_bytes: int | None = None
    #: the same, reserved or in use: only what is out of all proportion fails here
    reserved_bytes: int | None = None


def python_command() -> tuple[str, ...]:
    """The command that starts this interpreter; empty where there is none (embedded, frozen)."""
    if not sys.executable or getattr(sys, "frozen", False) or os.name != "posix":
        return ()
    return (sys.executable, "-I") if sys.flags.isolated else (sys.executable,)


def run_confined(
    module: str,
    function: str,
    request: bytes,
    limits: Limits,
    *,
    python: Sequence[str],
    descriptors: Sequence[int] = (),
    clock: Callable[[], float] = time.monotonic,
) -> bytes:
    """Calls `module.function(answer, parent, request)` in a child; returns what it gave to `say`.

    The function gives the first two, a descriptor and a process id, to `enter` before all else.
    `descriptors` stay open in the child, under their numbers. `python`: see `python_command`. Raises
    NoChildError, ConfinedError.
    """
    if not python:
        raise NoChildError("this interpreter cannot be started anew (it is embedded, or part of a program)")
    if len(request) > MAX_REQUEST_BYTES:
        raise NoChildError(f"a request of {len(request)} bytes; at most {MAX_REQUEST_BYTES} are possible")
    answer, given = os.pipe()
    code = _BOOT.format(
        paths=list(sys.path), module=module, function=function, answer=given, parent=os.getpid()
    )
    try:
        with os.fdopen(answer, "rb", buffering=0) as answers:
            try:
                process = subprocess.Popen(
                    [*python, "-c", code, request.decode("utf-8")],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=(given, *descriptors),
                    start_new_session=True,
                )
            except (OSError, ValueError, MemoryError) as error:
                raise NoChildError(f"no child process can be started: {one_line(error)}") from error
            finally:
                os.close(given)
            with _ended(process):
                return _Watch(process, limits, clock).result(answers.fileno())
    except OSError as error:
        raise NoChildError(f"a child process cannot be watched: {one_line(error)}") from error


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Whatever happens meanwhile (Ctrl-C): the child is gone afterwards."""
    try:
        yield
    finally:
        if process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(OSError):
                process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


@dataclass
class _Watch:
    process: subprocess.Popen[bytes]
    limits: Limits
    clock: Callable[[], float]
    said: bytearray = field(default_factory=bytearray)
    errors: bytearray = field(default_factory=bytearray)

    def result(self, answers: int) -> bytes:
        """Waits for the answer. Raises NoChildError, ConfinedError."""
        assert self.process.stderr is not None, "a pipe was asked for"
        start_s = self.clock()
        kept = {answers: self.said, self.process.stderr.fileno(): self.errors}
        with selectors.DefaultSelector() as selector:
            for descriptor in kept:
                os.set_blocking(descriptor, False)
                selector.register(descriptor, selectors.EVENT_READ)
            while True:
                ended = self.process.poll() is not None
                while read := selector.select(0 if ended else _LOOK_S):
                    for key, _ in read:
                        if not _take(key.fd, kept[key.fd]):
                            selector.unregister(key.fd)
                    self._look(self.clock() - start_s)
                    if not selector.get_map():
                        break
                if ended:
                    return self._answer()
                self._look(self.clock() - start_s)
                if not selector.get_map():  # nothing more to be said: only its end is waited for
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self.process.wait(_LOOK_S)

    def _look(self, elapsed_s: float) -> None:
        """Raises when a limit is passed."""
        if len(self.said) > MAX_SAID_BYTES:
            raise ConfinedError("said more than was asked for")
        if not self.said and elapsed_s > _START_S:
            raise NoChildError(f"a child process did not start within {_START_S:g} s")
        if self.said and elapsed_s > self.limits.wall_s:
            raise ConfinedError(f"took longer than {self.limits.wall_s:g} s")
        memory_bytes = self.limits.memory_bytes
        if memory_bytes is not None and _own_bytes(self.process.pid) > memory_bytes:
            raise ConfinedError(
                f"took more than the {memory_bytes // 1_000_000} MB of memory that it may take"
            )

    def _answer(self) -> bytes:
        """What the child said before it ended."""
        ready, _, answer = bytes(self.said).partition(b"\n")
        last = next((text for text in reversed(self.errors.splitlines()) if text.strip()), b"")
        words = one_line(last.decode("utf-8", "replace")) if last else ""
        if not ready.startswith(_READY):
            raise NoChildError(f"a child process did not start: {words or _how(self.process.returncode)}")
        if (machine := ready[len(_READY) :].decode("utf-8", "replace")) != platform.machine():
            raise NoChildError(f"the child process ran on {one_line(machine)}, not {platform.machine()}")
        if self.process.returncode < 0:
            raise ConfinedError(_how(self.process.returncode))
        if not answer:
            raise ConfinedError(words or _how(self.process.returncode))
        return answer


def _take(descriptor: int, kept: bytearray) -> bool:
    """Reads what is there, keeping the beginning and the end of a long text; False at the end."""
    try:
        data = os.read(descriptor, MAX_SAID_BYTES)
    except BlockingIOError:
        return True
    kept += data
    if len(kept) > 2 * MAX_SAID_BYTES:
        del kept[MAX_SAID_BYTES // 2 : -MAX_SAID_BYTES]
    return bool(data)


def _how(status: int) -> str:
    """How a process ended, in words."""
    if status >= 0:
        return f"ended with status {status}, without an answer"
    known = {item.value for item in signal.Signals}
    name = signal.Signals(-status).name if -status in known else f"signal {-status}"
    hints = {"SIGKILL": " (the system ran out of memory?)", "SIGXCPU": " (too much CPU time)"}
    return f"ended by {name}{hints.get(name, '')}"


def _own_bytes(pid: int, proc: Path = Path("/proc")) -> int:
    """Memory in use that no file backs; 0 where that is not told."""
    try:
        _, resident, shared, *_ = (proc / str(pid) / "statm").read_text().split()
        return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


# --- in the child -------------------------------------------------------------------------------------------


def enter(limits: Limits, answer: int, parent: int) -> None:
    """Confines this process for the rest of its life, and says that it has started. `answer`, `parent`: what
    `run_confined` gave."""
    import resource

    bounds = {
        "RLIMIT_CORE": 0,
        # It writes no file of its own; emulators of a CPU need a little for those of /proc that they imitate.
        "RLIMIT_FSIZE": 1 << 20,
        "RLIMIT_CPU": int(limits.cpu_s) + 1,
        "RLIMIT_DATA": limits.reserved_bytes,
    }
    for name, value in bounds.items():
        if value is not None and (kind := getattr(resource, name, None)) is not None:
            _, hard = resource.getrlimit(kind)
            most = value if hard == resource.RLIM_INFINITY else min(value, hard)
            last = most + _GRACE_S if kind == resource.RLIMIT_CPU and hard != most else most
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(kind, (most, last))
    with contextlib.suppress(
        OSError
    ):  # where memory is short, the system ends this process and not its parent
        Path("/proc/self/oom_score_adj").write_text("1000")
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # the parent is gone already
    os.write(answer, _READY + platform.machine().encode() + b"\n")


def say(answer: int, data: bytes) -> None:
    """Gives the answer and ends the process, without the teardown of what may be broken by now."""
    with contextlib.suppress(OSError):
        os.write(answer, data)
    os._exit(0)
