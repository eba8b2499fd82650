"""A chat model's streams for asynchronous callers. The model schedules; here threads only wait for it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref

from edge_reasoner.chat.model import ChatModel, ChatRequest, ChatResult, ChatStream
from edge_reasoner.errors import BackendError
from edge_reasoner.server.protocol import RequestError, ending, too_busy

#: how long the end of the service waits for model calls under way
_END_S = 10.0


class Streams:
    """The streams of one model: a bounded number, each read by a thread of its own.

    A client that reads slowly or not at all holds up nobody: the model does not wait for it, and its pieces
    are kept, at most as many as its answer may have tokens.
    """

    def __init__(self, model: ChatModel, *, max_waiting: int) -> None:
        """`max_waiting`: requests beyond one that is being answered; more are refused with 429."""
        self.model = model
        self._most = max_waiting + 1
        self._open: dict[_Bridge, threading.Thread] = {}
        self._lock = threading.Lock()
        self._ending = False

    def end(self) -> None:
        """Ends what is under way: each caller gets a RequestError(503) at once, whatever the model does, and
        the model stops after its call under way. New requests get the same. Never waits."""
        with self._lock:
            self._ending = True
            bridges = tuple(self._open)
        for bridge in bridges:
            bridge.post(ending())
            bridge.give_up()

    def close(self) -> None:
        """`end`, waits for the readers (for as long as a model call takes), and closes the model."""
        self.end()
        with self._lock:
            threads = tuple(self._open.values())
        until_s = time.monotonic() + _END_S
        for thread in threads:
            thread.join(max(0.0, until_s - time.monotonic()))
        self.model.close()

    def submit(self, request: ChatRequest) -> Results:
        """Starts an answer. Raises RequestError at once: 429 when there are too many, 503 when closed.

        What the model raises comes from the first item. Closing or dropping the results cancels the answer.
        """
        bridge = _Bridge(asyncio.get_running_loop())
        # a daemon: a model that never comes back must not keep the process from ending
        thread = threading.Thread(
            target=self._read, args=(request, bridge), name="edge-reasoner-stream", daemon=True
        )
        with self._lock:
            if self._ending:
                raise ending()
            if len(self._open) >= self._most:
                raise too_busy("the queue is full; try again later")
            self._open[bridge] = thread
        try:
            thread.start()
        except RuntimeError as error:
            # the system gives no thread
            self._forget(bridge)
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
        except BaseException as error:  # noqa: BLE001  # a library's panic, too, is an answer that failed
            failed = BackendError(f"{type(error).__name__} in the model: {error}")
            failed.__cause__ = error
            bridge.post(failed)
        finally:
            self._forget(bridge)

    def _forget(self, bridge: _Bridge) -> None:
        with self._lock:
            self._open.pop(bridge, None)


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
        if not self.closed:
            with contextlib.suppress(RuntimeError):  # the loop may close at any time; nobody waits then
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
