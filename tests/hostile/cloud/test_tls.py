"""Encrypted connections, direct and through proxies: they work, and refuse what is not who it says it is."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import threading
from collections.abc import Iterator

import pytest
from hostile.cloud.misbehaviour import (
    AUTHORITY,
    CERTIFICATE,
    DRIPPED,
    KEY,
    PATIENCE_S,
    client_threads,
    misbehaving,
    read_request,
    settled,
)
from support.hostile_cloud import GOOD, HEAD

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.cloud.base import CloudLimits, CloudOptions
from edge_reasoner.cloud.openai_protocol import OpenAIModel
from edge_reasoner.errors import CloudUnavailableError

REQUEST = ChatRequest(({"role": "user", "content": "hi " * 120_000},))
SHORT = ChatRequest(({"role": "user", "content": "hi"},))
TRUSTED = {"SSL_CERT_FILE": str(AUTHORITY), "OPENAI_API_KEY": "sk-not-a-real-key"}
LIMITS = CloudLimits(connect_s=20, read_s=20, total_s=60, attempts=1)
KEPT = GOOD.replace(b"Connection: close", b"Content-Length: %d" % (len(GOOD) - len(HEAD)))


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE, KEY)
    return context


def _secure(connection: socket.socket) -> None:
    """Answers over TLS for as long as it is asked."""
    with _context().wrap_socket(connection, server_side=True) as secured:
        while True:
            read_request(secured)
            secured.sendall(KEPT)


def _tunnel(connection: socket.socket) -> None:
    """An HTTP proxy: CONNECT, to this machine whatever the name says."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(65536)
    port = int(head.split(b" ")[1].rpartition(b":")[2])
    with socket.create_connection(("127.0.0.1", port)) as beyond:
        connection.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        back = threading.Thread(target=_copy, args=(beyond, connection), daemon=True)
        back.start()
        _copy(connection, beyond)
        back.join(PATIENCE_S)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def _secure_tunnel(connection: socket.socket) -> None:
    """An HTTPS proxy: the tunnel itself is encrypted."""
    inside, outside = socket.socketpair()
    with _context().wrap_socket(connection, server_side=True) as secured, inside, outside:
        served = threading.Thread(target=_quietly_tunnel, args=(inside,), daemon=True)
        served.start()
        # one thread per direction would need a lock around TLS: each reads only when there is something
        secured.settimeout(0.05)
        outside.settimeout(0.05)
        while served.is_alive():
            for source, target in ((secured, outside), (outside, secured)):
                with contextlib.suppress(TimeoutError):
                    data = source.recv(65536)
                    if not data:
                        return
                    target.sendall(data)


def _quietly_tunnel(connection: socket.socket) -> None:
    with contextlib.suppress(OSError, ValueError):
        _tunnel(connection)


@contextlib.contextmanager
def _client(url: str, limits: CloudLimits = LIMITS, **environment: str) -> Iterator[OpenAIModel]:
    client = OpenAIModel(CloudOptions(url, "m", limits=limits, environment=TRUSTED | environment))
    try:
        yield client
    finally:
        client.close()


def test_https_is_answered_over_one_connection() -> None:
    """A certificate that its authority has signed is trusted; the connection is kept."""
    with misbehaving(_secure) as server:
        with _client(f"https://{server.place}/v1") as client:
            assert [client.submit(REQUEST).result().text for _ in range(3)] == ["Hello"] * 3
            assert server.accepted == 1
        assert settled(lambda: server.open == 0 and not client_threads())


@pytest.mark.parametrize(
    ("proxy", "scheme"), [(_tunnel, "http"), (_secure_tunnel, "https")], ids=["http", "https"]
)
def test_https_through_proxies(proxy, scheme: str) -> None:
    """TLS through a tunnel, and through a tunnel that is encrypted itself."""
    with misbehaving(_secure) as server, misbehaving(proxy) as between:
        port = server.place.rpartition(":")[2]
        place = f"{scheme}://{between.place}"
        with _client(f"https://cloud.example:{port}/v1", https_proxy=place) as client:
            assert client.submit(REQUEST).result().text == "Hello"
        assert settled(lambda: server.open == 0 and between.open == 0 and not client_threads())


@pytest.mark.parametrize(
    ("host", "environment", "said"),
    [
        ("other.localhost", {}, "hostname|Hostname|not valid"),
        ("0.0.0.0", {}, "IP address|not valid"),
        ("127.0.0.1", {"SSL_CERT_FILE": ""}, "self.signed|unable to get"),
    ],
)
def test_a_certificate_of_somebody_else(host: str, environment, said: str) -> None:
    """Another name, another address, another authority: nothing is sent."""
    read = list[bytes]()

    def peer(connection: socket.socket) -> None:
        with _context().wrap_socket(connection, server_side=True) as secured:
            read.append(secured.recv(65536))

    with misbehaving(peer) as server:
        port = server.place.rpartition(":")[2]

        def resolve(_host, port, *_arguments):
            return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]

        options = CloudOptions(
            f"https://{host}:{port}/v1", "m", limits=LIMITS, environment=TRUSTED | environment
        )
        client = OpenAIModel(options, resolve=resolve)
        with pytest.raises(CloudUnavailableError, match=said):
            client.submit(REQUEST).result()
        client.close()
        assert settled(lambda: server.open == 0)
        assert not any(read)


@pytest.mark.parametrize(
    "kind", ["pipe", "folder", "device", "huge", "empty", "missing", "certificate cut off"]
)
def test_certificates_that_cannot_be_read(kind: str, tmp_path) -> None:
    """A pipe would be waited at for ever, a device read for ever; each is one clear error, and no thread is
    left."""
    path = tmp_path / "ca.pem"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 30)
    elif kind == "empty":
        path.touch()
    elif kind == "certificate cut off":
        path.write_bytes(AUTHORITY.read_bytes()[:300])
    with _client("https://127.0.0.1:9/v1", DRIPPED, SSL_CERT_FILE=str(path)) as client:
        with pytest.raises(CloudUnavailableError, match="SSL_CERT_FILE"):
            client.submit(SHORT).result()
        assert settled(lambda: not client_threads())
