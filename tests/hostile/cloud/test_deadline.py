"""One deadline over a whole exchange with a cloud: nothing is left after it, whatever the cloud does."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hostile.cloud.misbehaviour import (
    CHUNKED,
    DRIPPED,
    ENDLESS,
    ENDLESS_TLS,
    IMPATIENT,
    PATIENCE_S,
    client_threads,
    deaf,
    drips,
    misbehaving,
    replies,
    settled,
    silent,
)
from support.hostile_cloud import GOOD, HEAD, event, status

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.cloud.base import CloudLimits, CloudOptions
from edge_reasoner.cloud.openai_protocol import OpenAIModel
from edge_reasoner.errors import CloudError, CloudUnavailableError
from edge_reasoner.privacy.screen import Screen

SHORT = ChatRequest(({"role": "user", "content": "hi"},))
#: longer than what sockets on loopback buffer
LONG = ChatRequest(({"role": "user", "content": "long " * 1_600_000},))

_ROOMY = Screen(kinds=(), max_chars=10_000_000)


@contextlib.contextmanager
def _client(
    url: str, limits: CloudLimits = DRIPPED, model: str | None = "m", **parts
) -> Iterator[OpenAIModel]:
    made = OpenAIModel(CloudOptions(url, model, limits=limits, screen=_ROOMY), **parts)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("name", ENDLESS | ENDLESS_TLS)
def test_nothing_is_left_after_the_deadline(name: str) -> None:
    """An error, soon after the deadline, and then neither a thread of the client nor a socket."""
    secure = name in ENDLESS_TLS
    act = (ENDLESS | ENDLESS_TLS)[name]
    with misbehaving(act) as server:
        url = server.url.replace("http:", "https:") if secure else server.url
        with _client(url) as client:
            begun_s = time.monotonic()
            with pytest.raises(CloudError):
                client.submit(LONG if act is deaf else SHORT).result()
            assert time.monotonic() - begun_s < PATIENCE_S
            assert settled(lambda: not client_threads())
            # the client is not closed yet: it has let go of the socket by itself
            assert settled(lambda: server.open == 0)


@pytest.mark.parametrize("method", ["close", "cancel", "close the client"])
@pytest.mark.parametrize("name", ["accepts and says nothing", "sends 103 for ever", "drips text"])
def test_a_reader_that_stops_ends_it_at_once(name: str, method: str) -> None:
    """Long before the deadline: closing or cancelling a stream, and closing the client."""
    patient = CloudLimits(connect_s=600, read_s=600, total_s=600, settle_s=600)
    with misbehaving(ENDLESS[name]) as server, _client(server.url, patient) as client:
        stream = client.submit(SHORT)
        reader = threading.Thread(target=_read_on, args=(stream,), daemon=True)
        reader.start()
        assert settled(lambda: server.accepted == 1)
        {"close": stream.close, "cancel": stream.cancel, "close the client": client.close}[method]()
        reader.join(PATIENCE_S)
        assert not reader.is_alive()
        assert settled(lambda: not client_threads() and server.open == 0)


def test_a_stream_that_is_dropped_ends_it_at_once() -> None:
    """A reader that breaks off needs to close nothing."""
    patient = CloudLimits(connect_s=600, read_s=600, total_s=600, settle_s=600)
    with misbehaving(ENDLESS["drips text"]) as server, _client(server.url, patient) as client:
        for _ in client.submit(SHORT):
            break
        assert settled(lambda: not client_threads() and server.open == 0)


def _read_on(stream) -> None:
    with contextlib.suppress(CloudError):
        for _ in stream:
            pass


def test_a_reader_that_sleeps_holds_nothing() -> None:
    """A stream that is kept and not read has no more time than others."""
    with misbehaving(ENDLESS["drips text"]) as server, _client(server.url) as client:
        stream = client.submit(SHORT)
        assert next(stream) == "a"
        assert settled(lambda: not client_threads() and server.open == 0)
        with pytest.raises(CloudUnavailableError):
            stream.result()


def test_waits_between_attempts_end_with_the_reader() -> None:
    """A wait that the cloud asked for ends when its reader stops."""
    limits = CloudLimits(retry_after_cap_s=600, total_s=1200)
    with (
        misbehaving(replies(status(429, "Retry-After: 500\r\n"))) as server,
        _client(server.url, limits) as client,
    ):
        stream = client.submit(SHORT)
        reader = threading.Thread(target=_read_on, args=(stream,), daemon=True)
        reader.start()
        assert settled(lambda: server.accepted == 1 and server.open == 0)
        stream.cancel()
        reader.join(PATIENCE_S)
        assert not reader.is_alive() and settled(lambda: not client_threads())


@pytest.mark.parametrize("name", ["accepts and says nothing", "drips JSON", "sends 100 for ever"])
def test_a_list_of_models_that_does_not_end(name: str) -> None:
    """The question for the model is part of the exchange; who waits for its answer does not wait longer."""
    with misbehaving(ENDLESS[name]) as server, _client(server.url, model=None) as client:
        streams = [client.submit(SHORT) for _ in range(4)]
        readers = [threading.Thread(target=_read_on, args=(stream,), daemon=True) for stream in streams]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(PATIENCE_S)
        assert not any(reader.is_alive() for reader in readers)
        assert settled(lambda: not client_threads() and server.open == 0)


def test_a_connection_that_is_never_accepted() -> None:
    """A listener whose queue is full drops what comes: the attempt to connect ends with the request."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        place = listener.getsockname()
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(place)
        try:
            with _client(f"http://127.0.0.1:{place[1]}/v1") as client:
                with pytest.raises(CloudUnavailableError):
                    client.submit(SHORT).result()
                assert settled(lambda: not client_threads())
            patient = CloudLimits(connect_s=600, read_s=600, total_s=600)
            with _client(f"http://127.0.0.1:{place[1]}/v1", patient) as client:
                stream = client.submit(SHORT)
                canceller = threading.Timer(0.3, stream.cancel)
                canceller.start()
                assert stream.result().finish_reason == "cancelled"
                assert settled(lambda: not client_threads())
        finally:
            for filler in fillers:
                filler.close()


def test_names_that_are_never_found() -> None:
    """A lookup cannot be ended. Requests end all the same, and few lookups are left, whoever asks."""
    found, asked = threading.Event(), list[str]()

    def resolve(host, *_arguments):
        asked.append(host)
        found.wait(PATIENCE_S * 10)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    try:
        with _client("http://cloud.example/v1", resolve=resolve) as client:
            for _ in range(6):
                with pytest.raises(CloudUnavailableError):
                    client.submit(SHORT).result()
            assert settled(lambda: not client_threads())
            lookups = [thread for thread in threading.enumerate() if thread.name == "edge-reasoner-lookup"]
            assert 1 <= len(lookups) == len(asked) <= 4
            stream = client.submit(SHORT)
            canceller = threading.Timer(0.1, stream.cancel)
            canceller.start()
            assert stream.result().finish_reason == "cancelled"
    finally:
        found.set()
    assert settled(lambda: not any(thread.name == "edge-reasoner-lookup" for thread in threading.enumerate()))


def test_names_are_looked_up_anew() -> None:
    """A failed lookup is not remembered; one that succeeds is used by all who wait for it."""
    answers: list = [socket.gaierror(-2, "Name or service not known"), socket.gaierror(-3, "again")]

    def resolve(host, port, *_arguments):
        assert host == "cloud.example"
        if answers:
            raise answers.pop(0)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]

    with misbehaving(replies(GOOD)) as server:
        url = server.url.replace("127.0.0.1", "cloud.example")
        patient = CloudLimits(attempts=1)
        with _client(url, patient, resolve=resolve) as client:
            for said in ("not known", "again"):
                with pytest.raises(CloudUnavailableError, match=said):
                    client.submit(SHORT).result()
            assert client.submit(SHORT).result().text == "Hello"


@pytest.mark.parametrize("host", ["a" * 64 + ".example", "a..example", "x" * 300 + ".example", "\u00df" * 70])
def test_names_that_are_none(host: str) -> None:
    """Labels that are too long or empty are an error of the cloud or of the URL, in one line."""
    with contextlib.suppress(CloudError):
        from edge_reasoner.errors import InputError

        with contextlib.suppress(InputError), _client(f"http://{host}/v1", IMPATIENT) as client:
            client.submit(SHORT).result()


def test_a_disk_that_hangs(tmp_path, monkeypatch) -> None:
    """Certificates are read by one request; others wait for it as long as they have time."""
    pipe = tmp_path / "log"
    os.mkfifo(pipe)
    # the TLS library opens this by itself, and waits for a reader
    monkeypatch.setenv("SSLKEYLOGFILE", str(pipe))
    with _client("https://127.0.0.1:9/v1") as client:
        for _ in range(4):
            with pytest.raises(CloudUnavailableError):
                client.submit(SHORT).result()
        assert settled(lambda: len(client_threads()) <= 1)
        reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        assert settled(lambda: not client_threads())
        os.close(reader)


def test_an_answer_that_is_complete_outlives_the_deadline() -> None:
    """What drips after the finish reason costs neither the answer nor a thread."""
    after = drips(
        CHUNKED + b"%x\r\n%b\r\n" % (len(event("Hello", "stop")), event("Hello", "stop")), b"1\r\n:\r\n"
    )
    with misbehaving(after) as server, _client(server.url, replace(DRIPPED, settle_s=0.1)) as client:
        assert client.submit(SHORT).result().text == "Hello"
        assert settled(lambda: not client_threads() and server.open == 0)


def test_connections_are_kept_for_the_next_question() -> None:
    """A well-behaved endpoint is asked over one connection again and again."""
    reply = GOOD.replace(b"Connection: close", b"Content-Length: %d" % (len(GOOD) - len(HEAD)))
    served = list[int]()

    def serves(connection: socket.socket) -> None:
        from hostile.cloud.misbehaviour import read_request

        while True:
            read_request(connection)
            served.append(1)
            connection.sendall(reply)

    with misbehaving(serves) as server, _client(server.url, CloudLimits()) as client:
        assert [client.submit(SHORT).result().text for _ in range(5)] == ["Hello"] * 5
        assert (len(served), server.accepted) == (5, 1)
        client.close()
        assert settled(lambda: server.open == 0)


def test_a_stalled_upload_is_cut() -> None:
    """A long prompt that nobody takes ends at the deadline, and at once when its reader stops."""
    patient = CloudLimits(connect_s=600, read_s=600, total_s=600)
    with misbehaving(deaf) as server, _client(server.url, patient) as client:
        stream = client.submit(LONG)
        canceller = threading.Timer(0.3, stream.cancel)
        canceller.start()
        assert stream.result().finish_reason == "cancelled"
        assert settled(lambda: not client_threads() and server.open == 0)
    with misbehaving(silent) as server, _client(server.url) as client:
        with pytest.raises(CloudUnavailableError):
            client.submit(LONG).result()
        assert settled(lambda: server.open == 0)
