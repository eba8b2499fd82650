"""Small real socket servers that misbehave, for the cloud client's tests."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


def event(text: str | None = None, finish: str | None = None, **extra: object) -> bytes:
    """One chat-completions chunk as an SSE event."""
    delta = {} if text is None else {"content": text}
    chunk = {"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **extra}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def status(code: int, headers: str = "", body: bytes = b'{"error": {"message": "no\\nway"}}') -> bytes:
    """A whole plain reply."""
    head = f"HTTP/1.1 {code} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{headers}"
    return head.encode() + b"Connection: close\r\n\r\n" + body


GOOD = HEAD + event("Hel") + event("lo") + event(finish="stop") + b"data: [DONE]\n\n"


def drip(data: bytes, interval_s: float = 0.05) -> Callable[[socket.socket], None]:
    """Sends `data` over and over, one byte at a time."""

    def act(connection: socket.socket) -> None:
        while True:
            for byte in data:
                connection.sendall(bytes([byte]))
                time.sleep(interval_s)

    return act


def flood(head: bytes, data: bytes) -> Callable[[socket.socket], None]:
    """Sends `data` without end."""

    def act(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(data)

    return act


def hang(head: bytes = b"") -> Callable[[socket.socket], None]:
    """Sends `head`, then nothing, and keeps the connection open."""

    def act(connection: socket.socket) -> None:
        connection.sendall(head)
        time.sleep(5)

    return act


def reset(head: bytes = b"") -> Callable[[socket.socket], None]:
    """Sends `head`, then resets the connection (RST)."""

    def act(connection: socket.socket) -> None:
        connection.sendall(head)
        time.sleep(0.05)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return act


def send(data: bytes) -> Callable[[socket.socket], None]:
    """Sends `data` and closes."""
    return lambda connection: connection.sendall(data)


class HostileCloud:
    """Serves one behaviour per connection; the last one repeats. `requests` are what clients sent."""

    def __init__(self, *acts: Callable[[socket.socket], None]) -> None:
        self._acts = list(acts)
        self.requests: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}/v1"
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(2)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            act = self._acts.pop(0) if len(self._acts) > 1 else self._acts[0]
            threading.Thread(target=self._serve, args=(connection, act), daemon=True).start()

    def _serve(self, connection: socket.socket, act: Callable[[socket.socket], None]) -> None:
        with connection, contextlib.suppress(OSError):
            self.requests.append(_read_request(connection))
            act(connection)


class ScriptedCloud(HostileCloud):
    """Answers each request with the bytes of `reply(head, body)`; `posts` are the JSON bodies sent."""

    def __init__(self, reply: Callable[[bytes, bytes], bytes]) -> None:
        self._reply = reply
        super().__init__(send(b""))

    @property
    def posts(self) -> list[dict]:
        return [json.loads(r.partition(b"\r\n\r\n")[2]) for r in self.requests if r.startswith(b"POST")]

    def _serve(self, connection: socket.socket, act: Callable[[socket.socket], None]) -> None:
        with connection, contextlib.suppress(OSError):
            request = _read_request(connection)
            self.requests.append(request)
            head, _, body = request.partition(b"\r\n\r\n")
            connection.sendall(self._reply(head, body))


@contextlib.contextmanager
def scripted_cloud(reply: Callable[[bytes, bytes], bytes]) -> Iterator[ScriptedCloud]:
    """A running server that answers what it is asked, closed at the end."""
    server = ScriptedCloud(reply)
    try:
        yield server
    finally:
        server.close()


def _read_request(connection: socket.socket) -> bytes:
    connection.settimeout(2)
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        (
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        ),
        0,
    )
    while len(body) < length:
        body += connection.recv(65536)
    connection.settimeout(None)
    return head + b"\r\n\r\n" + body


@contextlib.contextmanager
def hostile_cloud(*acts: Callable[[socket.socket], None]) -> Iterator[HostileCloud]:
    """A running server, closed at the end."""
    server = HostileCloud(*acts)
    try:
        yield server
    finally:
        server.close()
