"""Requests to the server, as bytes: each is answered in the protocol or refused in it, whatever it is."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from types import SimpleNamespace

import h11
import pytest
from hostile.fuzz.mutate import FEW, MANY, check
from support.http_requests import post
from support.talking_model import TalkingModel

from edge_reasoner.server.app import create_app
from edge_reasoner.server.connection import Connection
from edge_reasoner.server.guard import Guard
from edge_reasoner.server.limits import Connections, HttpLimits
from edge_reasoner.server.work import Streams

CHAT = "/v1/chat/completions"
_ASK = {"model": "talking", "messages": [{"role": "user", "content": "Who?"}]}
_PARTS = [{"role": "developer", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "é\\n"}]}]
_BODY = json.dumps({**_ASK, "stream": True, "stream_options": {"include_usage": True}}).encode()
SEEDS = (
    post(CHAT, json.dumps(_ASK).encode()),
    post(CHAT, _BODY, more="Connection: close\r\n"),
    post(CHAT, json.dumps({**_ASK, "messages": _PARTS, "stop": ["a", "b"], "logprobs": True}).encode()),
    post(
        "/v1/completions",
        json.dumps({"model": "talking", "prompt": "x", "max_tokens": 3, "seed": 7, "top_p": 0.5}).encode(),
    ),
    f"POST {CHAT} HTTP/1.1\r\nHost: localhost:80\r\nContent-Type: application/json; charset=utf-8\r\n"
    f"Transfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n".encode()
    + b"%x;ext=1\r\n%s\r\n%x\r\n%s\r\n0\r\nX-End: y\r\n\r\n" % (9, _BODY[:9], len(_BODY) - 9, _BODY[9:]),
    b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1:9000\r\nAccept: */*\r\nUser-Agent: x\r\n\r\n" * 2,
    b"GET /v1/models/talking?x=%20y HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    b"HEAD /healthz HTTP/1.1\r\nHost: [::1]\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
    b"OPTIONS /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://x.example\r\n\r\n",
)
_WORDS = (
    *(
        b"GET",
        b"POST",
        b"HEAD",
        b"CONNECT",
        b"TRACE",
        b"PRI",
        b"HTTP/1.0",
        b"HTTP/2.0",
        b"chunked",
        b"gzip",
        b"*",
    ),
    *(b"Content-Length", b"Transfer-Encoding", b"Host", b"Origin", b"Connection", b"close", b"Upgrade", b"0"),
    *(
        b"localhost",
        b"%00",
        b"%0d%0a",
        b"%zz",
        b"//",
        b"/..",
        b"http://x/",
        b"\r",
        b"\n",
        b"\r\n",
        b"\r\n\r\n",
    ),
    *(
        b": ",
        b" ",
        b"\t",
        b"\r\n ",
        b"99999999999999999999",
        b"-1",
        b"+5",
        b"0x5",
        b"1e400",
        b"true",
        b"\\u0000",
    ),
)


class _Wire(asyncio.Transport):
    """A socket's place: what the service writes is kept."""

    def __init__(self, protocol: Connection) -> None:
        super().__init__({"peername": ("127.0.0.1", 1), "sockname": ("127.0.0.1", 2)})
        self.written = bytearray()
        self._protocol, self._closing = protocol, False

    def write(self, data: bytes) -> None:
        assert not self._closing, "written after the end"
        self.written += data

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self._protocol.connection_lost, None)

    abort = close

    def is_closing(self) -> bool:
        return self._closing

    def write_eof(self) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None: ...


class _Noted(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.getMessage()} {record.exc_info or ''}")


class Service:
    """One service, without a socket."""

    def __init__(self, streams: Streams) -> None:
        limits = HttpLimits()
        self.server = SimpleNamespace(
            limits=limits,
            guard=Guard(limits),
            application=create_app(streams),
            connections=Connections(limits),
            tasks=set(),
            ending=False,
        )

    async def exchange(self, pieces: list[bytes]) -> bytes:
        """What comes back for the pieces, each sent when the one before has had its effect."""
        connection = Connection(self.server)
        wire = _Wire(connection)
        connection.connection_made(wire)
        for piece in pieces:
            if wire.is_closing():
                break
            connection.data_received(piece)
            while connection.phase == "answer":
                await asyncio.sleep(0)
        if not wire.is_closing():
            connection.eof_received()
            wire.close()
        while len(self.server.connections) or self.server.tasks:
            await asyncio.sleep(0)
        return bytes(wire.written)


@pytest.fixture(scope="module")
def service() -> Iterator[tuple[Service, asyncio.AbstractEventLoop]]:
    """The service and its loop."""
    loop = asyncio.new_event_loop()
    streams = Streams(TalkingModel(lambda request, cancellation: iter(["do", "ne"])), max_waiting=8)
    yield Service(streams), loop
    streams.close()
    loop.close()


def _check_replies(heard: bytes, sent: bytes) -> None:
    """Whole replies, one after the other; what refuses says why as the protocol has it."""
    if b"HEAD" in sent:
        # which of the replies have no body, only the service knows
        assert not heard or heard.startswith(b"HTTP/1.1 ")
        return
    while heard:
        reader = h11.Connection(h11.CLIENT)
        reader.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
        reader.send(h11.EndOfMessage())
        reader.receive_data(heard)
        status, body = 0, b""
        while not isinstance(event := reader.next_event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                status = event.status_code
            elif isinstance(event, h11.Data):
                body += event.data
            elif event is h11.NEED_DATA:
                # a reply without length ends with the connection; a client that was told to go on and went
                # away gets none
                if status == 0 and heard.startswith(b"HTTP/1.1 100 "):
                    return
                reader.receive_data(b"")
        if status >= 400:
            error = json.loads(body)["error"]
            assert error["code"] == status and error["message"] and "\n" not in error["message"]
        heard = reader.trailing_data[0]


def _fuzz(service: tuple[Service, asyncio.AbstractEventLoop], count: int, seed: int) -> None:
    served, loop = service
    noted, faults = _Noted(), []
    loop.set_exception_handler(lambda _loop, context: faults.append(context))
    logging.getLogger().addHandler(noted)

    def fuzz_server_request(data: bytes) -> None:
        cut = len(data) * (len(data) % 7) // 7
        heard = loop.run_until_complete(
            served.exchange([piece for piece in (data[:cut], data[cut:]) if piece])
        )
        _check_replies(heard, data)
        assert not noted.lines and not faults, f"{noted.lines} {faults}"

    try:
        check(fuzz_server_request, SEEDS, count, seed=seed, words=_WORDS)
    finally:
        logging.getLogger().removeHandler(noted)


def test_requests(service: tuple[Service, asyncio.AbstractEventLoop]) -> None:
    """A few hundred."""
    _fuzz(service, FEW, seed=1)


@pytest.mark.slow
def test_many_requests(service: tuple[Service, asyncio.AbstractEventLoop]) -> None:
    """As many as the long run takes."""
    _fuzz(service, MANY, seed=2)


def test_the_seeds_are_answered(service: tuple[Service, asyncio.AbstractEventLoop]) -> None:
    """All but the preflight: what the mutations begin with is whole."""
    served, loop = service
    statuses = [loop.run_until_complete(served.exchange([seed]))[9:12] for seed in SEEDS]
    assert statuses == [b"200"] * 4 + [b"100"] + [b"200"] * 3 + [b"403"]
