"""A chat model's streams for asynchronous callers. The model schedules; here threads only wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

from edge_reasoner.chat.model import ChatModel, ChatRequest, ChatResult, ChatStream
from edge_reasoner.server.protocol import RequestError

_RETRY_AFTER_S = 2


def too_busy(why: str) -> RequestError:
    """The reply to a request that would have to wait too long."""
    return RequestError(429, why, "rate_limit_error", _RETRY_AFTER_S)


class Streams:
    """The streams of one model: a bounded number, each read by a thread of its own.

    A client that reads slowly or not at all holds up nobody: the model does not wait for it, and its pieces
    are kept, at most as many as its answer may have tokens.
    """

    def __init__(self, model: ChatModel, *, max_waiting: int) -> None:
        """`max_waiting`: requests beyond one that is being answered; more are refused with 429."""
        self.model = model
        self._most = max_waiting + 1
        self._open: set[_Bridge] = set()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(self._most, thread_name_prefix="edge-reasoner-stream")

    def close(self) -> None:
        """Cancels what is under way, waits for its readers, and closes the model."""
        with self._lock:
            bridges = tuple(self._open)
        for bridge in bridges:
            bridge.give_up()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.model.close()

    def submit(self, request: ChatRequest) -> Results:
        """Starts an answer. Raises RequestError at once: 429 when there are too many, 503 when closed.

        What the model raises comes from the first item. Closing or dropping the results cancels the answer.
        """
        bridge = _Bridge(asyncio.get_running_loop())
        with self._lock:
            if len(self._open) >= self._most:
                raise too_busy("the queue is full; try again later")
            self._open.add(bridge)
        try:
            self._pool.submit(self._read, request, bridge)
        except RuntimeError as error:
            # shut down, or the system gives no thread
            bridge.give_up()
            with self._lock:
                self._open.discard(bridge)
            raise RequestError(503, "the service takes no requests now", "server_error") from error
        return Results(bridge)

    def _read(self, request: ChatRequest, bridge: _Bridge) -> None:
        try:
            if bridge.closed:
                return
            stream = self.model.submit(request)
            bridge.follow(stream)
            try:
                for piece in stream:
                    bridge.post(piece)
                bridge.post(stream.result())
            finally:
                stream.close()
        except Exception as error:  # noqa: BLE001  # the thread's edge: the request gets the error
            bridge.post(error)
        finally:
            with self._lock:
                self._open.discard(bridge)


class Results:
    """An answer's pieces and, last, the whole of it, asynchronously. Raises what the model raised."""

    def __init__(self, bridge: _Bridge) -> None:
        self._bridge = bridge
        self._ended = False
        weakref.finalize(self, bridge.drop).atexit = False

    def __aiter__(self) -> Results:
        return self

    async def __anext__(self) -> str | ChatResult:
        if self._ended:
            raise StopAsyncIteration
        item = await self._bridge.take()
        self._ended = not isinstance(item, str)
        if isinstance(item, Exception):
            raise item
        return item

    async def aclose(self) -> None:
        """Cancels the answer, begun or not. Idempotent."""
        self._ended = True
        self._bridge.give_up()


class _Bridge:
    """From one reading thread to one asynchronous caller."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.closed = False
        self._loop = loop
        self._items: asyncio.Queue[str | ChatResult | Exception] = asyncio.Queue()
        self._stream: ChatStream[str, ChatResult] | None = None

    def follow(self, stream: ChatStream[str, ChatResult]) -> None:
        """The stream that is cancelled when the caller goes away, also if it has gone already."""
        self._stream = stream
        if self.closed:
            stream.cancel()

    def post(self, item: str | ChatResult | Exception) -> None:
        """Hands an item over; nobody waits."""
        if not self.closed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    def give_up(self) -> None:
        """Nobody reads any more: the answer is cancelled."""
        self.closed = True
        if self._stream is not None:
            self._stream.cancel()

    def drop(self) -> None:
        """`give_up`, by the garbage collector: not here, where any lock may be held."""
        with contextlib.suppress(RuntimeError):  # a loop that is closed has no answers under way
            self._loop.call_soon_threadsafe(self.give_up)

    async def take(self) -> str | ChatResult | Exception:
        """The next item."""
        return await self._items.get()
