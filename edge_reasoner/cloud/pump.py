"""Runs a blocking generator in a thread, so that its consumer never waits beyond a deadline.

The thread ends with its request: at the deadline, and when the consumer stops, the request's line is cut,
which ends whatever the thread waits for.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator

from edge_reasoner.chat.model import Cancellation, PieceT, PulledStream, ResultT
from edge_reasoner.cloud.line import Line
from edge_reasoner.errors import CloudProtocolError, CloudUnavailableError, EdgeReasonerError, one_line

_QUEUE_ITEMS = 256
_POLL_S = 0.1


class _Waker:
    """Ends the request, and wakes a consumer that waits at the queue."""

    def __init__(self, items: queue.Queue[tuple[str, object]], line: Line) -> None:
        self._items = items
        self._line = line

    def cancel(self) -> None:
        self._line.cut()
        # a full queue wakes its consumer by itself
        with contextlib.suppress(queue.Full):
            self._items.put_nowait(("wake", None))


def pumped(
    source: Generator[PieceT, None, ResultT],
    *,
    line: Line,
    deadline_s: Callable[[], float],
    late: Callable[[], ResultT],
    cancelled: Callable[[], ResultT],
    cancellation: Cancellation,
) -> Generator[PieceT, None, ResultT]:
    """Yields what `source` yields and returns what it returns; at the deadline returns or raises what `late`
    does, and when cancelled what `cancelled` does, at once. The deadline is asked for anew after every item.

    `source` runs in a daemon thread, over `line`, which is cut when the consumer stops; it then ends at once.
    Raises CloudUnavailableError where there is no thread to be had; whatever `source` raises that is no error
    of ours is a CloudProtocolError: a reply must not bring down who asked.
    """
    items: queue.Queue[tuple[str, object]] = queue.Queue(_QUEUE_ITEMS)
    abandoned = threading.Event()
    thread = threading.Thread(
        target=_run, args=(source, items, abandoned, line), name="edge-reasoner-cloud", daemon=True
    )
    try:
        thread.start()
    except RuntimeError as error:
        raise CloudUnavailableError(f"no thread for the request could be started: {error}") from error
    cancellation.follow(_Waker(items, line))
    try:
        while not cancellation.wanted:
            try:
                kind, value = items.get(timeout=max(0.0, deadline_s() - line.clock()))
            except queue.Empty:
                return late()
            if kind == "error":
                assert isinstance(value, BaseException)
                if isinstance(value, EdgeReasonerError):
                    raise value
                text = f"the reply could not be read ({type(value).__name__}: {one_line(value, 100)})"
                raise CloudProtocolError(text) from value
            if kind == "result":
                return value  # type: ignore[return-value]  # the queue carries several kinds of value
            if kind == "item":
                yield value  # type: ignore[misc]
        return cancelled()
    finally:
        abandoned.set()
        line.cut()


def _run(
    source: Generator[PieceT, None, ResultT],
    items: queue.Queue[tuple[str, object]],
    abandoned: threading.Event,
    line: Line,
) -> None:
    def put(kind: str, value: object) -> bool:
        # also a consumer that holds on to the answer and does not read has no more time than others
        while not abandoned.is_set() and not line.late:
            try:
                items.put((kind, value), timeout=_POLL_S)
            except queue.Full:
                continue
            return True
        return False

    stream = PulledStream(source)
    try:
        for item in stream:
            if not put("item", item):
                return
        put("result", stream.result())
    except BaseException as error:  # noqa: BLE001  # a thread's edge: the consumer raises it
        put("error", error)
    finally:
        stream.close()
