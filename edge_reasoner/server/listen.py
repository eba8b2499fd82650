"""The loop that serves: a listening socket, its connections, and the end of them.

The first SIGINT or SIGTERM ends the service within one model call: open streams end with an error event,
requests under way with a 503. A second one ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from edge_reasoner.chat.model import ChatModel
from edge_reasoner.errors import InputError
from edge_reasoner.server.app import DEFAULT_MAX_WAITING, create_app
from edge_reasoner.server.connection import Application, Connection
from edge_reasoner.server.guard import Guard
from edge_reasoner.server.limits import Connections, HttpLimits
from edge_reasoner.server.work import Streams

_BACKLOG = 128
_START_TIMEOUT_S = 10.0
_THREAD_END_S = 30.0
_POLL_S = 0.02
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    model: ChatModel,
    *,
    host: str = "127.0.0.1",
    port: int = 9000,
    max_waiting: int = DEFAULT_MAX_WAITING,
    auth_token: str | None = None,
    allow_hosts: Collection[str] = (),
    limits: HttpLimits | None = None,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves until interrupted, and closes the model. Raises InputError when the address cannot be bound.

    `allow_hosts`: names that clients may call the service by, beside loopback's, `host` and the address that
    they reach it at; "*": any. `ready` gets the base URL (…/v1) once connections are accepted; with port 0 it
    says which was taken.
    """
    with _listener(host, port) as listener:
        server = _Server(model, max_waiting, auth_token, _names(host, allow_hosts), limits)
        if ready is not None:
            shown = f"[{host}]" if ":" in host else host
            ready(f"http://{shown}:{listener.getsockname()[1]}/v1")
        with _signals(server.stop) as heard:
            asyncio.run(server.run(listener))
    for number in heard:
        # now that all is closed, whoever called sees the signal as without a service
        signal.raise_signal(number)


@contextmanager
def serving(
    model: ChatModel,
    *,
    port: int = 0,
    max_waiting: int = DEFAULT_MAX_WAITING,
    auth_token: str | None = None,
    allow_hosts: Collection[str] = (),
    limits: HttpLimits | None = None,
) -> Iterator[str]:
    """Serves on loopback in a thread for the length of a `with`; gives the base URL (…/v1)."""
    with _listener("127.0.0.1", port) as listener:
        server = _Server(model, max_waiting, auth_token, allow_hosts, limits)
        thread = threading.Thread(target=lambda: asyncio.run(server.run(listener)), daemon=True)
        thread.start()
        try:
            # the socket listens already: requests wait in its backlog until the loop runs
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            server.stop()
            thread.join(_THREAD_END_S)


class _Server:
    """One service: what its connections share. Runs once."""

    def __init__(
        self,
        model: ChatModel,
        max_waiting: int,
        auth_token: str | None,
        names: Collection[str],
        limits: HttpLimits | None,
    ) -> None:
        self.limits = limits or HttpLimits()
        self.guard = Guard(self.limits, names=names, auth_token=auth_token)
        self.connections = Connections(self.limits)
        self.tasks: set[asyncio.Task[None]] = set()
        self.ending = False
        self._streams = Streams(model, max_waiting=max_waiting)
        self.application: Application = create_app(self._streams)
        self._stopped = threading.Event()
        self._wake: Callable[[], None] = lambda: None

    def stop(self) -> None:
        """Asks for the end. Any thread may call it, a signal's handler too."""
        self._stopped.set()
        self._wake()

    async def run(self, listener: socket.socket) -> None:
        """Serves until `stop` was called, and closes the model."""
        loop, woken = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # a loop that is closed has stopped
                loop.call_soon_threadsafe(woken.set)

        self._wake = wake
        accepting = await loop.create_server(lambda: Connection(self), sock=listener, backlog=_BACKLOG)
        if not self._stopped.is_set():
            await woken.wait()
        self.ending = True
        accepting.close()
        self._streams.end()
        for connection in self.connections.all():
            connection.end()
        await self._all_gone()
        await asyncio.to_thread(self._streams.close)

    async def _all_gone(self) -> None:
        """Lets the clients read how their answers ended, for a moment."""
        until_s = asyncio.get_running_loop().time() + self.limits.end_s
        while (self.tasks or len(self.connections)) and asyncio.get_running_loop().time() < until_s:
            await asyncio.sleep(_POLL_S)
        for task in self.tasks:
            task.cancel()
        for connection in self.connections.all():
            connection.evict()


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[list[int]]:
    """Calls `stop` at the first signal; the next ends the process. Gives those that were heard."""
    heard: list[int] = []
    before: dict[int, Any] = {}

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        stop()

    if threading.current_thread() is threading.main_thread():
        # what the caller ignores (a job in the background) stays ignored
        before = {each: now for each in _SIGNALS if (now := signal.getsignal(each)) is not signal.SIG_IGN}
        for each in before:
            signal.signal(each, hear)
    try:
        yield heard
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _names(host: str, allowed: Collection[str]) -> list[str]:
    """`host` is a name of the service too, unless it stands for any address."""
    return [*allowed, *([] if host in ("", "0.0.0.0", "::") else [host])]


def _listener(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise InputError(f"port: {port} is not allowed; give 0 (any free port) to 65535")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot listen on {host}:{port}: {error}") from error
