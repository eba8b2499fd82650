"""A chat model's streams for asynchronous callers. The model schedules; here threads only wait for it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from edge_reasoner.chat.model import ChatModel, ChatRequest, ChatResult, ChatStream
from edge_reasoner.server.protocol import RequestError

_RETRY_AFTER_S = 2

#: an answer's pieces and, last, the whole of it
Results = AsyncGenerator[str | ChatResult, None]


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
        """Starts an answer. Raises RequestError(429) at once when there are too many.

        What the model raises comes from the first item. Closing the generator cancels the answer.
        """
        bridge = _Bridge(asyncio.get_running_loop())
        with self._lock:
            if len(self._open) >= self._most:
                raise too_busy("the queue is full; try again later")
            self._open.add(bridge)
        self._pool.submit(self._read, request, bridge)
        return bridge.items()

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


class _Bridge:
    """From one reading thread to one asynchronous caller."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.closed = False
        self._loop = loop
        self._items: asyncio.Queue[Any] = asyncio.Queue()
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

    async def items(self) -> Results:
        """The items, up to the whole answer. Raises what the model raised."""
        try:
            while True:
                item = await self._items.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if not isinstance(item, str):
                    return
        finally:
            self.give_up()
