"""Ways in which a cloud endpoint misbehaves, and a real server on loopback that does it.

An act gets an accepted connection, from which nothing was read. It ends when the client has closed the
connection at the latest, so that `Misbehaving.open` counts the sockets that a client has left behind.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from support.hostile_cloud import GOOD, HEAD, event, status

from edge_reasoner.cloud.base import CloudLimits

Act = Callable[[socket.socket], None]

#: small, so that a cloud that hangs costs a test little; nothing is measured against them but from above
IMPATIENT = CloudLimits(
    connect_s=0.3,
    read_s=0.3,
    total_s=0.5,
    settle_s=0.2,
    attempts=2,
    backoff_base_s=0.01,
    line_bytes=20_000,
    response_bytes=200_000,
    answer_chars=20_000,
    idle_events=2000,
)
#: for cases in which only the total may end it
DRIPPED = CloudLimits(**{**IMPATIENT.__dict__, "connect_s": 30.0, "read_s": 30.0, "settle_s": 30.0})
#: longer than any machine takes to end what has been cut
PATIENCE_S = 20.0

CHUNKED = HEAD.replace(b"Connection: close", b"Transfer-Encoding: chunked")
JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n"
_PAUSE_S = 0.02


class Misbehaving:
    """Serves `choose(number)` on the connection of that number. `accepted` counts them."""

    def __init__(self, choose: Callable[[int], Act]) -> None:
        self._choose = choose
        self.accepted = 0
        self._open = set[socket.socket]()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.place = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.url = f"http://{self.place}/v1"
        self._thread = threading.Thread(target=self._accept, name="misbehaving", daemon=True)
        self._thread.start()

    @property
    def open(self) -> int:
        """Connections that the client has not closed yet."""
        with self._lock:
            return len(self._open)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE_S)
        with self._lock:
            for connection in self._open:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            act = self._choose(self.accepted)
            with self._lock:
                self.accepted += 1
                self._open.add(connection)
            threading.Thread(
                target=self._serve, args=(connection, act), name="misbehaving-served", daemon=True
            ).start()

    def _serve(self, connection: socket.socket, act: Act) -> None:
        try:
            # two tiny cores: a stuck peer must not keep a thread here for ever either
            connection.settimeout(PATIENCE_S)
            with contextlib.suppress(OSError):
                act(connection)
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()


@contextlib.contextmanager
def misbehaving(act: Act | Callable[[int], Act], *, by_number: bool = False) -> Iterator[Misbehaving]:
    """A running server with one act for all, or one by the connection's number."""
    server = Misbehaving(act if by_number else lambda _: act)
    try:
        yield server
    finally:
        server.close()


def client_threads() -> list[str]:
    """Names of the client's threads that are alive."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("edge-reasoner-cloud")]


def settled(is_so: Callable[[], bool]) -> bool:
    """Whether something becomes so within a time that is long for any machine."""
    end_s = time.monotonic() + PATIENCE_S
    while not is_so():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.01)
    return True


def read_request(connection: socket.socket) -> None:
    """Reads a whole request."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += _received(connection)
    head, _, body = data.partition(b"\r\n\r\n")
    lines = [line.lower() for line in head.split(b"\r\n")]
    left = sum(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length")) - len(body)
    while left > 0:
        left -= len(_received(connection))


def until_closed(connection: socket.socket) -> None:
    """Waits for the client's end."""
    while connection.recv(65536):
        pass


def _received(connection: socket.socket) -> bytes:
    data = connection.recv(65536)
    if not data:
        raise ConnectionError("the client has gone")
    return data


def replies(*parts: bytes, hang: bool = False, reset: bool = False) -> Act:
    """Reads the request and sends these bytes; then closes, resets, or falls silent."""

    def act(connection: socket.socket) -> None:
        read_request(connection)
        for part in parts:
            connection.sendall(part)
        if hang:
            until_closed(connection)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return act


def drips(head: bytes, again: bytes, *, whole: bool = False) -> Act:
    """Reads the request, sends `head`, then `again` for ever, a byte (or all of it) now and then."""

    def act(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(head)
        while True:
            for piece in [again] if whole else [again[at : at + 1] for at in range(len(again))]:
                connection.sendall(piece)
                time.sleep(_PAUSE_S)

    return act


def floods(head: bytes, again: bytes) -> Act:
    """Reads the request, sends `head`, then `again` for ever as fast as it is taken."""

    def act(connection: socket.socket) -> None:
        read_request(connection)
        connection.sendall(head)
        while True:
            connection.sendall(again)

    return act


def silent(connection: socket.socket) -> None:
    """Accepts, reads, and never says anything."""
    until_closed(connection)


def deaf(connection: socket.socket) -> None:
    """Accepts, and reads a byte now and then."""
    watch = select.poll()
    watch.register(connection, 0)
    # the client's end shows at once, however much was sent before it
    while not watch.poll(_PAUSE_S * 1e3) and connection.recv(1):
        pass


def drips_at_once(again: bytes) -> Act:
    """Reads nothing and sends bytes now and then: below HTTP."""

    def act(connection: socket.socket) -> None:
        while True:
            for at in range(len(again)):
                connection.sendall(again[at : at + 1])
                time.sleep(_PAUSE_S)

    return act


def sends_at_once(data: bytes) -> Act:
    """Reads nothing, sends and closes."""
    return lambda connection: connection.sendall(data)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _counts(prompt: str, completion: str) -> bytes:
    usage = b'{"prompt_tokens": %s, "completion_tokens": %s}' % (prompt.encode(), completion.encode())
    last = b'data: {"choices": [], "usage": %s}\n\n' % usage
    return HEAD + event("Hel") + event("lo", "stop") + last + b"data: [DONE]\n\n"


_WHOLE = event("Hello", "stop") + b"data: [DONE]\n\n"
_ERROR = b'data: {"error": {"message": "worker died", "code": 500}}\n\n'

#: what only a deadline over everything ends: name → act
ENDLESS: dict[str, Act] = {
    "accepts and says nothing": silent,
    "drips a status line": drips(b"HTTP/1.1 2", b"0"),
    "drips a header": drips(b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "drips headers": drips(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n"),
    "sends 100 for ever": drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n", whole=True),
    "sends 103 for ever": drips(b"", b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n", whole=True),
    "drips 102": drips(b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "drips a comment": drips(HEAD, b": ping\n"),
    "drips text": drips(HEAD, event("a"), whole=True),
    "drips thinking": drips(HEAD, event("a").replace(b'"content"', b'"reasoning_content"'), whole=True),
    "drips bytes of events": drips(HEAD, event("a")),
    "drips a chunk's size": drips(CHUNKED, b"0"),
    "drips a chunk's extension": drips(CHUNKED + b"5;", b"x"),
    "drips chunks": drips(CHUNKED, b"1\r\n:\r\n"),
    "drips trailers": drips(CHUNKED + b"2\r\n\n\n\r\n0\r\n", b"X-A: b\r\n"),
    "drips JSON": drips(JSON_HEAD, b" "),
    "drips gzip": drips(
        HEAD.replace(b"Connection", b"Content-Encoding: gzip\r\nConnection"), b"\x1f\x8b\x08"
    ),
    "drips a refusal": drips(b"HTTP/1.1 429 X\r\nContent-Length: 99999\r\n\r\n", b"no "),
    "a refusal that falls silent": replies(b"HTTP/1.1 400 X\r\nContent-Length: 9\r\n\r\nno", hang=True),
    "falls silent after the head": replies(HEAD, hang=True),
    "falls silent in an event": replies(HEAD + event("Hel")[:-9], hang=True),
    "falls silent after text": replies(HEAD + event("Hel"), hang=True),
    "reads a byte now and then": deaf,
}
#: the same over https://
ENDLESS_TLS: dict[str, Act] = {
    "TLS: accepts and says nothing": silent,
    "TLS: reads a byte now and then": deaf,
    "TLS: drips a handshake": drips_at_once(b"\x16\x03\x03\x40\x00" + b"\x02\x00\x3f\xfc" + b"\x03" * 16),
    "TLS: drips alerts": drips_at_once(b"\x15\x03\x03\x00\x02\x01\x5a"),
    "TLS: HTTP instead": replies(status(400)),
    "TLS: garbage": sends_at_once(bytes(range(256)) * 40),
    "TLS: closes": lambda connection: None,
}
#: what ends by itself
BRIEF: dict[str, Act] = {
    "closes": lambda connection: None,
    "closes after the request": replies(),
    "resets": replies(reset=True),
    "resets in the head": replies(HEAD[:20], reset=True),
    "resets after text": replies(HEAD + event("Hel"), reset=True),
    "resets after the finish reason": replies(HEAD + _WHOLE[:-14], reset=True),
    "HTTP/0.9": replies(b"Hello\n"),
    "another protocol": sends_at_once(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "TLS instead": sends_at_once(b"\x15\x03\x01\x00\x02\x02\x46"),
    "bytes": replies(os.urandom(50_000)),
    "no status": replies(b"HTTP/1.1\r\n\r\n"),
    "a status of words": replies(b"HTTP/1.1 abc OK\r\n\r\n"),
    "status 999": replies(b"HTTP/1.1 999 X\r\nContent-Length: 0\r\n\r\n"),
    "status 101": replies(b"HTTP/1.1 101 X\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n", hang=True),
    "floods 100": floods(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "redirects to itself": replies(status(307, "Location: /v1/chat/completions\r\n")),
    "redirects to nonsense": replies(status(302, "Location: http://[::1/\r\n")),
    "a header of 100 kB": replies(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 100_000 + b"\r\n\r\n"),
    "10,000 headers": replies(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 10_000 + b"\r\n" + _WHOLE),
    "a header of bytes": replies(b"HTTP/1.1 200 OK\r\nContent-Type: \xff\xfe\r\n\xff: \x00\r\n\r\n"),
    "a content type of bytes": replies(b"HTTP/1.1 200 OK\r\nContent-Type: \xff\xfe;\xe9\r\n\r\n" + _WHOLE),
    "two lengths": replies(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nHello"),
    "a negative length": replies(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\nHello"),
    "a length of 2^80": replies(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % 2**80 + event("a")),
    "a chunk of 2^80": replies(CHUNKED + b"%x\r\n" % 2**80 + event("a")),
    "bad chunks": replies(CHUNKED + b"zz\r\n"),
    "floods extensions": floods(CHUNKED, b"1;" + b"x" * 5000 + b"\r\n\n\r\n"),
    "floods comments": floods(HEAD, b": ping\n" * 1000),
    "floods empty events": floods(HEAD, b"data:\n\n" * 1000),
    "floods text": floods(HEAD, event("a") * 100),
    "floods a line": floods(HEAD + b"data: ", b"a" * 10_000),
    "a gzip bomb": replies(
        HEAD.replace(b"Connection", b"Content-Encoding: gzip\r\nConnection"), gzip.compress(b"\n" * 9_000_000)
    ),
    "called gzip": replies(GOOD.replace(b"Connection", b"Content-Encoding: gzip\r\nConnection")),
    "an odd encoding": replies(GOOD.replace(b"Connection", b"Content-Encoding: br, \xff\r\nConnection")),
    "nothing": replies(HEAD),
    "only [DONE]": replies(HEAD + b"data: [DONE]\n\n"),
    "only a finish reason": replies(HEAD + event(finish="stop") + b"data: [DONE]\n\n"),
    "invisible text": replies(HEAD + event("\u200b\u2060 \ufeff", "stop")),
    "an empty message": replies(status(200, body=_json({"choices": [{"message": {"content": ""}}]}))),
    "null": replies(HEAD + b"data: null\n\n"),
    "deep JSON": replies(HEAD + b"data: " + b"[" * 15_000 + b"\n\n"),
    "an error after text": replies(HEAD + event("Hel") + _ERROR),
    "an error after the finish reason": replies(HEAD + event("Hello", "stop") + _ERROR),
    "tokens of 1e400": replies(_counts("1e400", "1e400")),
    "tokens of -1": replies(_counts("-1", "-1")),
    "tokens of 2^80": replies(_counts(str(2**80), str(2**80))),
    "tokens of 5,000 digits": replies(_counts("9" * 5000, "9" * 5000)),
    "tokens of NaN": replies(_counts("NaN", "Infinity")),
    "Retry-After of 100,000 digits": replies(status(429, f"Retry-After: {'9' * 90_000}\r\n")),
    "Retry-After in the past": replies(status(503, "Retry-After: Mon, 01 Jan 0000 00:00:00 -9999\r\n")),
    "a failure inside 200": replies(status(200, body=_json({"error": {"message": "no", "code": 502}}))),
    "lone surrogates": replies(HEAD + b'data: {"choices":[{"delta":{"content":"\\ud800"}}]}\n\n' + _WHOLE),
    "HTML": replies(HEAD + b"<html>" * 1000),
    "an answer": replies(GOOD),
    "an answer without [DONE]": replies(HEAD + event("Hel") + event("lo", "stop")),
}

_FOLDER = Path(__file__).parent
CERTIFICATE, KEY = _FOLDER / "server.pem", _FOLDER / "server.key"
AUTHORITY = _FOLDER / "authority.pem"
