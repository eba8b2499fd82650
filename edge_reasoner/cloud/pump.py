"""Runs a blocking generator in a thread, so that its consumer never waits beyond a deadline.

Socket time-outs bound one read each; name resolution has none at all, and a server may drip a header byte now
and then for days. The consumer's own clock is the only bound that holds for all of them.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Generator

from edge_reasoner.chat.model import Cancellation, PieceT, PulledStream, ResultT
from edge_reasoner.errors import CloudUnavailableError

_QUEUE_ITEMS = 256
_POLL_S = 0.1


class _Waker:
    """Wakes a consumer that waits at the queue."""

    def __init__(self, items: queue.Queue[tuple[str, object]]) -> None:
        self._items = items

    def cancel(self) -> None:
        # a full queue wakes its consumer by itself
        with contextlib.suppress(queue.Full):
            self._items.put_nowait(("wake", None))


def pumped(
    source: Generator[PieceT, None, ResultT],
    *,
    deadline_s: Callable[[], float],
    clock: Callable[[], float],
    late: Callable[[], ResultT],
    cancelled: Callable[[], ResultT],
    cancellation: Cancellation,
) -> Generator[PieceT, None, ResultT]:
    """Yields what `source` yields and returns what it returns; at the deadline returns or raises what `late`
    does, and when cancelled what `cancelled` does, at once. The deadline is asked for anew after every item.

    `source` runs in a daemon thread. When the consumer stops, `source` is closed at its next item; a source
    that is stuck in a system call is left to that call's own end. Raises CloudUnavailableError where there is
    no thread to be had.
    """
    items: queue.Queue[tuple[str, object]] = queue.Queue(_QUEUE_ITEMS)
    abandoned = threading.Event()
    thread = threading.Thread(
        target=_run, args=(source, items, abandoned), name="edge-reasoner-cloud", daemon=True
    )
    try:
        thread.start()
    except RuntimeError as error:
        raise CloudUnavailableError(f"no thread for the request could be started: {error}") from error
    cancellation.follow(_Waker(items))
    try:
        while not cancellation.wanted:
            try:
                kind, value = items.get(timeout=max(0.0, deadline_s() - clock()))
            except queue.Empty:
                return late()
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            if kind == "result":
                return value  # type: ignore[return-value]  # the queue carries several kinds of value
            if kind == "item":
                yield value  # type: ignore[misc]
        return cancelled()
    finally:
        abandoned.set()


def _run(
    source: Generator[PieceT, None, ResultT],
    items: queue.Queue[tuple[str, object]],
    abandoned: threading.Event,
) -> None:
    def put(kind: str, value: object) -> bool:
        while not abandoned.is_set():
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
