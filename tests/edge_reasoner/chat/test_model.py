"""`PulledStream`: read by several threads, after errors, from within itself, in a forked child."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from edge_reasoner.chat.model import Cancellation, PulledStream, Usage
from edge_reasoner.errors import CloudProtocolError, EdgeReasonerError, InputError

TIMEOUT_S = 60


@dataclass(frozen=True)
class _Result:
    text: str = "whole"
    thinking: str | None = None
    model: str = "m"
    finish_reason: str = "stop"
    usage: Usage | None = None


class _Pieces:
    """Numbers as pieces; `inside` says that a reader is in the generator, which waits there for `go_on`."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.count, self.error = count, error

    def __iter__(self) -> Iterator[str]:
        for number in range(self.count):
            if number == 1:
                self.inside.set()
                assert self.go_on.wait(TIMEOUT_S)
            yield str(number)
        if self.error is not None:
            raise self.error
        return _Result()


def _read_by(readers: int, stream: PulledStream, pieces: _Pieces) -> tuple[list[str], list[object]]:
    """What `readers` threads took, and what each ended with. They all begin while one is inside."""
    taken: list[str] = []
    ends: list[object] = []
    asked = threading.Semaphore(0)

    def read() -> None:
        asked.release()
        try:
            for piece in stream:
                taken.append(piece)
            ends.append(stream.result())
        except EdgeReasonerError as error:
            ends.append(error)

    threads = [threading.Thread(target=read) for _ in range(readers)]
    threads[0].start()
    assert pieces.inside.wait(TIMEOUT_S)
    for thread in threads[1:]:
        thread.start()
    for _ in threads:
        assert asked.acquire(timeout=TIMEOUT_S)
    pieces.go_on.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    return taken, ends


@pytest.mark.parametrize("readers", [2, 5])
def test_several_threads_read_one_stream(readers: int) -> None:
    """Each piece is given once, and every reader gets the whole result."""
    pieces = _Pieces(300)
    taken, ends = _read_by(readers, PulledStream(iter(pieces)), pieces)
    assert sorted(map(int, taken)) == list(range(300))
    assert ends == [_Result()] * readers


def test_an_error_is_every_readers() -> None:
    """Whoever comes after the one that met it gets the same error, not an end that looks like success."""
    error = CloudProtocolError("it broke off")
    pieces = _Pieces(20, error)
    stream = PulledStream(iter(pieces))
    taken, ends = _read_by(3, stream, pieces)
    assert len(taken) == 20 and ends == [error] * 3
    with pytest.raises(CloudProtocolError, match="broke off"):
        next(stream)


def test_closing_while_another_thread_reads_cancels() -> None:
    """The reader that is inside is told; nothing is raised in either thread."""
    pieces, cancellation = _Pieces(3), Cancellation()
    stream = PulledStream(iter(pieces), cancellation)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    assert pieces.inside.wait(TIMEOUT_S)
    stream.close()
    assert cancellation.wanted and stream.cancelled
    pieces.go_on.set()
    reader.join(TIMEOUT_S)
    assert not reader.is_alive()


def test_a_closed_stream_ends_for_all() -> None:
    """No piece and no result after `close`, as often as it is called."""
    pieces = _Pieces(1)
    stream = PulledStream(iter(pieces))
    stream.close()
    stream.close()
    assert list(stream) == []
    with pytest.raises(InputError, match="closed before its end"):
        stream.result()


def test_read_or_closed_from_within() -> None:
    """A signal's handler that reads what it interrupts gets one clear error; one that closes it, cancels."""
    streams: list[PulledStream] = []

    def interrupted() -> Iterator[str]:
        with pytest.raises(InputError, match="being read already"):
            next(streams[0])
        streams[0].close()
        yield "going on"
        return _Result()

    streams.append(PulledStream(interrupted()))
    assert next(streams[0]) == "going on" and streams[0].cancelled
    assert streams[0].result() == _Result()


FORK = """
import os, signal, sys, threading, warnings
warnings.simplefilter("ignore", DeprecationWarning)
from edge_reasoner.chat.model import PulledStream
from edge_reasoner.errors import BackendError
inside, go_on = threading.Event(), threading.Event()

def pieces():
    inside.set()
    go_on.wait()
    yield "a"

stream = PulledStream(pieces())
reader = threading.Thread(target=lambda: list(stream))
reader.start()
inside.wait()
number = os.fork()
if number == 0:
    signal.alarm(60)
    try:
        next(stream)
    except BackendError as error:
        print(error, flush=True)
    stream.close()
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]))
go_on.set()
reader.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_does_not_wait_for_its_parents_reader() -> None:
    """The lock that a thread of the parent holds is held in the child for ever: nobody waits for it there."""
    ran = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=TIMEOUT_S * 2, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    said, status = ran.stdout.splitlines()
    assert said.startswith("the stream was begun before this process was forked") and status == "0"
