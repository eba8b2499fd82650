"""Clients that send or read too slowly, or too many: the others are answered, and nothing is left of them."""

from __future__ import annotations

import json
import resource
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import openai
import pytest
from support.http_requests import exchange, port_of, post
from support.local_models import scripted_model
from support.talking_model import TalkingModel

from edge_reasoner.server.limits import HttpLimits
from edge_reasoner.server.reference import ReferenceModel, serving

TIMEOUT_S = 60.0
CHAT = "/v1/chat/completions"
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "capital"}]}


def _connect(base: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port_of(base)), timeout=TIMEOUT_S)


def _comes_true(condition: Callable[[], bool]) -> bool:
    """Whether it does; the time is a bound for a hang, not a measure."""
    end_s = time.monotonic() + TIMEOUT_S
    while not condition() and time.monotonic() < end_s:
        time.sleep(0.02)
    return condition()


def _sockets() -> int:
    """Open sockets of this process: of clients and of the service."""
    links = []
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            links.append(str(descriptor.readlink()))
        except OSError:
            continue
    return sum(link.startswith("socket:") for link in links)


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _answers(client: openai.OpenAI) -> bool:
    reply = client.chat.completions.create(**ASK, temperature=0)
    chunks = client.chat.completions.create(**ASK, temperature=0, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    return reply.choices[0].message.content == streamed == "Paris"


@contextmanager
def _slow_clients(base: str, heads: int, bodies: int) -> Iterator[None]:
    """Connections whose heads and bodies never become whole."""
    with ExitStack() as stack:
        for number in range(heads + bodies):
            connection = stack.enter_context(_connect(base))
            if number < heads:
                connection.sendall(HEAD[: 1 + number % len(HEAD)])
            else:
                connection.sendall(HEAD + b"Content-Length: 2000000\r\n\r\n" + b" " * 70_000)
        yield


def _shut_nobody_out(limits: HttpLimits, heads: int, bodies: int, rounds: int) -> None:
    with (
        serving(ReferenceModel(scripted_model({"capital": "Paris"})), limits=limits) as base,
        openai.OpenAI(base_url=base, api_key="none", max_retries=0, timeout=TIMEOUT_S) as client,
    ):
        assert _answers(client)
        sockets, threads = _sockets(), threading.active_count()
        resident_bytes = []
        for _ in range(rounds):
            with _slow_clients(base, heads, bodies):
                assert _answers(client)
                with openai.OpenAI(base_url=base, api_key="x", max_retries=0, timeout=TIMEOUT_S) as other:
                    assert _answers(other), "a client that comes now is answered too"
            assert _comes_true(lambda: _sockets() <= sockets)
            assert _comes_true(lambda: threading.active_count() <= threads)
            resident_bytes.append(_resident_bytes())
        assert resident_bytes[-1] - resident_bytes[0] < 32 * 1024 * 1024


def test_slow_clients_shut_nobody_out() -> None:
    """More slow heads and bodies than the service takes connections: normal clients are answered."""
    _shut_nobody_out(HttpLimits(connections=16, head_s=600, body_s=600), heads=18, bodies=10, rounds=2)


@pytest.mark.slow
def test_many_slow_clients_shut_nobody_out() -> None:
    """90 slow heads and 50 slow bodies, again and again: sockets, threads and memory stay as they were."""
    _shut_nobody_out(HttpLimits(), heads=90, bodies=50, rounds=10)


def test_bodies_are_bounded_together() -> None:
    """Unfinished bodies that would fill the memory cost the oldest of them their place."""
    limits = HttpLimits(bodies_bytes=500_000, body_s=600)
    with (
        serving(ReferenceModel(scripted_model({"capital": "Paris"})), limits=limits) as base,
        ExitStack() as s,
    ):
        slow = []
        for _ in range(8):
            slow.append(s.enter_context(_connect(base)))
            slow[-1].sendall(HEAD + b"Content-Length: 2000000\r\n\r\n" + b" " * 200_000)
        with pytest.raises(OSError):
            # the first ones are cut off
            while slow[0].recv(100):
                pass
            raise ConnectionResetError
        body = json.dumps({**ASK, "metadata": {"x": "y" * 300_000}}).encode()
        connection = s.enter_context(_connect(base))
        connection.sendall(post(CHAT, body))
        assert connection.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""),
        (b"GET /he", b"HTTP/1.1 408"),
        (HEAD, b"HTTP/1.1 408"),
        (HEAD + b"Content-Length: 9\r\n\r\n{", b"HTTP/1.1 408"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", b"HTTP/1.1 408"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", b"HTTP/1.1 200"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he", b"HTTP/1.1 200"),
    ],
)
def test_time_is_bounded(sent: bytes, status: bytes) -> None:
    """Heads, bodies and pauses have a limit; after it the connection ends, with a word to a request begun."""
    limits = HttpLimits(head_s=0.1, body_s=0.1, idle_s=0.1)
    with serving(ReferenceModel(scripted_model({})), limits=limits) as base, _connect(base) as connection:
        connection.sendall(sent)
        heard = b""
        while piece := connection.recv(65536):
            heard += piece
        assert heard.startswith(status) and bool(heard) == bool(status)
        assert heard.count(b"408") % 2 == 0, "in the status and in the body"


@pytest.mark.parametrize("start", [b"GET /", HEAD + b"Content-Length: 4000000\r\n\r\n"])
def test_dripping_does_not_help(start: bytes) -> None:
    """A byte now and then buys no time."""
    limits = HttpLimits(head_s=0.3, body_s=0.3)
    with serving(ReferenceModel(scripted_model({})), limits=limits) as base, _connect(base) as connection:
        connection.sendall(start)
        while not select.select([connection], [], [], 0.01)[0]:
            connection.sendall(b"x")
        assert connection.recv(100).startswith(b"HTTP/1.1 408")


def test_a_client_that_never_closes_is_left() -> None:
    """A refused client that keeps its side open does not keep the connection."""
    limits = HttpLimits(head_s=0.1)
    with serving(ReferenceModel(scripted_model({})), limits=limits) as base:
        exchange(base, HEALTH)  # the service runs from here on
        before = _sockets()
        with ExitStack() as stack:
            for _ in range(5):
                stack.enter_context(_connect(base)).sendall(b"\x00\r\n\r\n")
            assert _comes_true(lambda: _sockets() <= before + 5), "the clients' own are left"


def test_a_client_that_never_reads_is_left() -> None:
    """An answer that nobody takes is kept for a while only; the model was not held up by it."""
    long = TalkingModel(lambda request, cancellation: iter(["x" * 100_000] * 400))
    with serving(long, limits=HttpLimits(write_s=0.2)) as base:
        exchange(base, HEALTH)  # the service runs from here on
        before = _sockets()
        body = json.dumps({**ASK, "model": "talking", "stream": True}).encode()
        with ExitStack() as stack:
            for _ in range(3):
                connection = stack.enter_context(socket.socket())
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                connection.connect(("127.0.0.1", port_of(base)))
                connection.sendall(post(CHAT, body))
            for _ in range(3):
                assert long.ended.acquire(timeout=TIMEOUT_S)
            assert _comes_true(lambda: _sockets() <= before + 3), "the clients' own are left"


def test_a_flood_of_requests_before_an_answer_is_cut_off() -> None:
    """A client that sends on and on while it is answered is no client."""
    done = threading.Event()

    def script(request, cancellation):
        while not cancellation.wanted and not done.is_set():
            time.sleep(0.02)
            yield "x"

    model = TalkingModel(script)
    with serving(model) as base, _connect(base) as connection:
        connection.sendall(post(CHAT, json.dumps({**ASK, "model": "talking"}).encode()))
        assert model.started.acquire(timeout=TIMEOUT_S)
        try:
            with pytest.raises(OSError):
                while True:
                    connection.sendall(b"GET /healthz HTTP/1.1\r\n" * 1000)
            assert model.ended.acquire(timeout=TIMEOUT_S), "nobody reads that answer"
        finally:
            done.set()


def test_descriptors_do_not_pile_up() -> None:
    """Hundreds of connections that come and go leave nothing."""
    with serving(ReferenceModel(scripted_model({}))) as base:
        exchange(base, HEALTH)  # the service runs from here on
        before = _descriptors()
        for number in range(300):
            with _connect(base) as connection:
                connection.sendall(HEAD[: number % len(HEAD)])
        assert _comes_true(lambda: _descriptors() <= before)
