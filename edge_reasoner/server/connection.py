"""One HTTP/1.1 connection: bounded in bytes and in time, one request after the other.

h11 reads and writes the protocol, `Guard` judges heads, an ASGI application answers. What is here is when a
request is handed over (once it is whole) and when a connection ends. A client is never waited for without a
limit of time, and never holds more than its limits of memory.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, Protocol, cast

import h11

from edge_reasoner.errors import one_line
from edge_reasoner.server.guard import Guard, Head, check_lines
from edge_reasoner.server.limits import Connections, HttpLimits, Phase
from edge_reasoner.server.protocol import RequestError, ending

Message = MutableMapping[str, Any]
Application = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]
_WRITE_AHEAD_BYTES = 64 * 1024
#: what is read and dropped of a client that sends on after its refusal, so that it can read the reply
_LINGER_BYTES = 8 * 1024 * 1024
_LINGER_S = 2.0
#: of the next request, before the one under way is answered
_EARLY_BYTES = 64 * 1024
#: of one body; each costs work, however short it is
_MOST_CHUNKS = 8192
_log = logging.getLogger(__name__)


class Server(Protocol):
    """What a connection needs of its server."""

    limits: HttpLimits
    guard: Guard
    application: Application
    connections: Connections
    #: the answers under way
    tasks: set[asyncio.Task[None]]
    #: no further request is taken
    ending: bool


class Connection(asyncio.Protocol):
    """Reads requests, lets the application answer each, and gives up when a limit is reached."""

    def __init__(self, server: Server) -> None:
        self.client = ""
        self.phase: Phase = "idle"
        self._server = server
        self._limits = server.limits
        self._loop = asyncio.get_running_loop()
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=server.limits.head_bytes)
        self._transport: asyncio.Transport
        self._local = ""
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._gone = asyncio.Event()
        self._head: Head | None = None
        self._raw_head = bytearray()
        self._body = bytearray()
        self._chunks = 0
        self._early = bytearray()
        self._dropped_bytes = 0

    # --- what a full service asks

    @property
    def waits_for_client(self) -> bool:
        """See `Held`."""
        return self.phase != "answer" or not self._writable.is_set()

    @property
    def body_bytes(self) -> int:
        """See `Held`."""
        return len(self._body)

    def evict(self) -> None:
        """See `Held`."""
        self._server.connections.discard(self)
        self._drop_body()
        self.phase = "closing"
        self._abort()

    def end(self) -> None:
        """See `Held`: whoever is still asking hears why."""
        if self.phase == "idle":
            self.finish()
        elif self.phase in ("head", "body"):
            self._refuse(ending())

    # --- what asyncio tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come."""
        self._transport = cast(asyncio.Transport, transport)
        peer, local = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        self.client = str(peer[0]) if peer else ""
        self._local = str(local[0]) if local else ""
        self._transport.set_write_buffer_limits(high=_WRITE_AHEAD_BYTES)
        if self._server.ending or not self._server.connections.admit(self):
            self._refuse(RequestError(503, "too many connections; try again later", "server_error", 1))
        else:
            self._wait("idle", self._limits.head_s)

    def data_received(self, data: bytes) -> None:
        """Bytes have come."""
        if self.phase == "closing":
            self._dropped_bytes += len(data)
            if self._dropped_bytes > _LINGER_BYTES:
                self._abort()
        elif self.phase == "answer":
            # the next request waits; who sends much before it was answered is no client of this protocol
            self._early += data
            if len(self._early) > _EARLY_BYTES:
                self._abort()
        else:
            if self.phase == "idle":
                self._wait("head", self._limits.head_s)
            self._read(data)

    def eof_received(self) -> bool:
        """The client sends no more: it is gone. What is written still goes out."""
        self._gone.set()
        self._wait("closing", self._limits.write_s)
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """The connection is over."""
        self._disarm()
        self._resume()
        self._drop_body()
        self._early.clear()
        self._gone.set()
        self.phase = "closing"
        self._server.connections.discard(self)

    def pause_writing(self) -> None:
        """The client reads more slowly than it is answered."""
        self._writable.clear()
        self._write_timer = self._loop.call_later(self._limits.write_s, self._abort)

    def resume_writing(self) -> None:
        """It has caught up."""
        self._resume()

    def _resume(self) -> None:
        self._writable.set()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    # --- a request comes in

    def _read(self, data: bytes) -> None:
        if self.phase == "head":
            self._raw_head += data
        self._h11.receive_data(data)
        self._advance()

    def _advance(self) -> None:
        """Takes what is whole of what was received."""
        while self.phase in ("head", "body"):
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as error:
                said = one_line(error, 120)
                self._refuse(RequestError(error.error_status_hint, f"not a request of HTTP/1.1: {said}"))
                return
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return
            try:
                self._take(event)
            except RequestError as error:
                self._refuse(error)
                return

    def _take(self, event: object) -> None:
        if isinstance(event, h11.Request):
            self._head = Head(
                event.method.decode("ascii"),
                event.target.decode("ascii", "replace"),
                event.http_version.decode("ascii"),
                tuple(event.headers),
                self._local,
            )
            check_lines(bytes(self._raw_head))
            self._raw_head.clear()
            self._server.guard.check(self._head)
            self._chunks = 0
            self._wait("body", self._limits.body_s)
            if self._h11.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
                self._write(self._h11.send(go_on))
        elif isinstance(event, h11.Data):
            self._body += event.data
            self._server.connections.grow(self, len(event.data))
            self._chunks += event.chunk_start
            if self._chunks > _MOST_CHUNKS:
                raise RequestError(400, f"the body has more than {_MOST_CHUNKS} chunks")
            if len(self._body) > self._limits.body_bytes:
                raise RequestError(413, f"the request exceeds {self._limits.body_bytes} bytes")
        elif isinstance(event, h11.EndOfMessage):
            assert self._head is not None, "a body follows its head"
            if len(event.headers) > self._limits.headers:
                raise RequestError(431, f"the body's end has more than {self._limits.headers} fields")
            body = bytes(self._body)
            self._drop_body()
            self._disarm()
            self._wait("answer", None)
            exchange = _Exchange(self, self._head, body)
            task = self._loop.create_task(exchange.run(self._server.application))
            self._server.tasks.add(task)
            task.add_done_callback(self._server.tasks.discard)

    def _drop_body(self) -> None:
        self._server.connections.shrink(len(self._body))
        self._body = bytearray()

    # --- time

    def _wait(self, phase: Phase, seconds: float | None) -> None:
        """Comes to another phase, which may last so long."""
        self._disarm()
        self.phase = phase
        self._server.connections.step(self)
        if seconds is not None:
            self._timer = self._loop.call_later(seconds, self._too_late)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        if self.phase == "idle":
            self.finish()
        elif self.phase == "head":
            self._refuse(RequestError(408, f"the head took longer than {self._limits.head_s:g} s"))
        elif self.phase == "body":
            self._refuse(RequestError(408, f"the request took longer than {self._limits.body_s:g} s"))
        else:
            self._abort()

    # --- an answer goes out

    @property
    def is_gone(self) -> bool:
        """Whether nobody is there any more."""
        return self._gone.is_set()

    @property
    def is_last(self) -> bool:
        """Whether the connection ends with this answer."""
        return self._server.ending

    async def gone(self) -> None:
        """Waits until nobody is there any more."""
        await self._gone.wait()

    async def send(self, event: h11.Event) -> None:
        """Sends a part of a reply, and waits while the client is behind."""
        if self.is_gone:
            return
        self._write(self._h11.send(event))
        await self._writable.wait()

    def answered(self) -> None:
        """The reply is whole: on to the next request, or to the end."""
        if self.is_gone or self._transport.is_closing():
            return
        if (
            self._server.ending
            or self._h11.our_state is not h11.DONE
            or self._h11.their_state is not h11.DONE
        ):
            self.finish()
            return
        self._h11.start_next_cycle()
        self._wait("idle", self._limits.idle_s)
        self._head = None
        early, self._early = bytes(self._early), bytearray()
        if trailing := self._h11.trailing_data[0]:
            # the beginning of the next request came with the end of this one
            self._raw_head += trailing
        if early or trailing:
            self._wait("head", self._limits.head_s)
            self._read(early) if early else self._advance()

    def broken(self) -> None:
        """The reply cannot be ended as it began."""
        self._abort()

    def finish(self) -> None:
        """Ends the connection once all is written; what still comes in is dropped, for a moment."""
        if self._transport.is_closing():
            return
        behind = self._transport.get_write_buffer_size()
        self._drop_body()
        self._wait("closing", self._limits.write_s if behind else _LINGER_S)
        self._transport.write_eof()

    def _refuse(self, error: RequestError) -> None:
        """Answers a request that did not come to the application, and ends the connection."""
        body = json.dumps(error.body()).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *([] if error.retry_after_s is None else [(b"retry-after", str(error.retry_after_s).encode())]),
        ]
        bodiless = self._head is not None and self._head.method == "HEAD"
        try:
            self._write(self._h11.send(_response(error.status, headers, last=True)))
            if not bodiless:
                self._write(self._h11.send(h11.Data(data=body)))
            self._write(self._h11.send(h11.EndOfMessage()))
        except h11.LocalProtocolError:
            self._abort()
            return
        self.finish()

    def _write(self, data: bytes | None) -> None:
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def _abort(self) -> None:
        self._transport.abort()


class _Exchange:
    """One request and its answer, as ASGI has them."""

    def __init__(self, connection: Connection, head: Head, body: bytes) -> None:
        self._connection = connection
        self._head = head
        self._body: bytes | None = body
        self._started = self._whole = False

    async def run(self, application: Application) -> None:
        """Lets the application answer. Nothing is raised: the log has what went wrong."""
        try:
            await application(self._scope(), self._receive, self._send)
        except asyncio.CancelledError:
            self._connection.broken()
            raise
        except Exception as error:  # noqa: BLE001  # the connection's edge: the others go on
            _log.error("request failed: %s: %s", type(error).__name__, one_line(error))
        if self._whole or self._connection.is_gone:
            return
        if self._started:
            self._connection.broken()
            return
        failed = json.dumps(RequestError(500, "the service failed", "server_error").body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(failed)).encode())]
        await self._send({"type": "http.response.start", "status": 500, "headers": headers})
        await self._send({"type": "http.response.body", "body": failed})

    def _scope(self) -> dict[str, Any]:
        path, _, query = self._head.target.partition("?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": self._head.version,
            "server": None,
            "client": (self._connection.client, 0),
            "scheme": "http",
            "method": self._head.method,
            "root_path": "",
            "path": self._head.path(),
            "raw_path": path.encode("ascii", "replace"),
            "query_string": query.encode("ascii", "replace"),
            "headers": list(self._head.headers),
        }

    async def _receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if not self._whole:
            await self._connection.gone()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        connection = self._connection
        if message["type"] == "http.response.start":
            self._started = True
            headers = [(name, value) for name, value in message.get("headers", ())]
            await connection.send(_response(message["status"], headers, last=connection.is_last))
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if body and self._head.method != "HEAD":
            await connection.send(h11.Data(data=body))
        if not more and not self._whole:
            self._whole = True
            await connection.send(h11.EndOfMessage())
            connection.answered()


def _response(status: int, headers: list[tuple[bytes, bytes]], *, last: bool) -> h11.Response:
    added = [(b"date", formatdate(usegmt=True).encode()), (b"x-content-type-options", b"nosniff")]
    if last:
        added.append((b"connection", b"close"))
    return h11.Response(status_code=status, headers=added + headers, reason=_phrase(status))


def _phrase(status: int) -> bytes:
    try:
        return HTTPStatus(status).phrase.encode()
    except ValueError:
        return b""
