"""Heads that no client of the service sends: web pages, foreign names, two lengths, odd targets."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest
from support.http_requests import exchange, port_of, post
from support.local_models import scripted_model

from edge_reasoner.errors import InputError
from edge_reasoner.server.reference import ReferenceModel, serving

ASK = json.dumps(
    {"model": "tiny", "messages": [{"role": "user", "content": "capital"}], "max_tokens": 2}
).encode()
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A served scripted model."""
    with serving(ReferenceModel(scripted_model({"capital": "Paris"}))) as base:
        yield base


def _status(heard: bytes) -> int:
    """The status of the first reply; its body, if it has one, is the protocol's error or an answer."""
    head, _, body = heard.partition(b"\r\n\r\n")
    if body:
        said = json.loads(body[: int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])])
        assert set(said) & {"error", "object", "status"}
    assert b"access-control" not in head.lower()
    return int(head.split(b" ", 2)[1])


def _raw(*lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1") + body


def _ask(*lines: str, body: bytes = ASK, length: bool = True) -> bytes:
    told = [f"Content-Length: {len(body)}"] if length else []
    return _raw(f"POST {CHAT} HTTP/1.1", *lines, *told, body=body)


JSON = "Content-Type: application/json"


def _short(value: object) -> str:
    return repr(value)[:60]


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:80", "localhost.", "app.localhost:1", "127.0.0.1", "127.8.9.1:9000"),
        *("[::1]", "[::1]:9000", "[::ffff:127.0.0.1]"),
    ],
)
def test_own_names_are_served(url: str, host: str) -> None:
    """Whatever loopback is called, with any port (a tunnel has another one)."""
    assert _status(exchange(url, _ask(f"Host: {host}", JSON))) == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:9000", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.7"),
        *("", "localhost:x", "localhost:1:2", "user@localhost", "localhost/evil", "[::1", "::1", "0.0.0.0"),
        *("127.0.0.1, evil.example", "2130706433", "0x7f.1", "localh\xf6st", "*", "[fe80::1%25eth0]"),
    ],
)
@pytest.mark.parametrize("method", ["GET /v1/models", "GET /healthz", f"POST {CHAT}"])
def test_foreign_names_are_refused(url: str, host: str, method: str) -> None:
    """A page whose own name points to this machine gets nothing out of it, not even the model's name."""
    heard = exchange(url, _raw(f"{method} HTTP/1.1", f"Host: {host}", JSON, "Content-Length: 0"))
    assert _status(heard) in (400, 403) and b"tiny" not in heard


@pytest.mark.parametrize(
    "lines",
    [
        ["Origin: http://evil.example"],
        ["Origin: null"],
        ["Origin: http://localhost:9000"],
        ["Origin: "],
        ["Sec-Fetch-Site: cross-site"],
        ["Sec-Fetch-Site: same-site"],
    ],
)
def test_web_pages_are_refused(url: str, lines: list[str]) -> None:
    """Whatever page it is, also for plain reading."""
    assert _status(exchange(url, _ask("Host: localhost", JSON, *lines))) == 403
    assert _status(exchange(url, _raw("GET /v1/models HTTP/1.1", "Host: localhost", *lines))) == 403


def test_preflight_is_refused(url: str) -> None:
    """No question of a browser whether it may send is answered with yes."""
    asked = ["Origin: http://evil.example", "Access-Control-Request-Method: POST"]
    assert _status(exchange(url, _raw(f"OPTIONS {CHAT} HTTP/1.1", "Host: localhost", *asked))) == 403
    assert _status(exchange(url, _raw(f"OPTIONS {CHAT} HTTP/1.1", "Host: localhost"))) == 405


@pytest.mark.parametrize(
    "kind",
    [
        *("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json"),
        *("text/plain; application/json", "application/jsonp", "application/json, text/plain"),
    ],
)
def test_only_json_bodies(url: str, kind: str) -> None:
    """What a form or a script may send without being asked is no request, nor is a body without a type."""
    assert _status(exchange(url, _ask("Host: localhost", f"Content-Type: {kind}"))) == 415
    assert _status(exchange(url, _ask("Host: localhost"))) == 415
    assert _status(exchange(url, _ask("Host: localhost", JSON, "Content-Type: text/plain"))) == 415
    assert _status(exchange(url, _ask("Host: localhost", JSON, "Content-Encoding: gzip"))) == 415
    assert (
        _status(exchange(url, _ask("Host: localhost", "content-type: Application/JSON; charset=utf-8")))
        == 200
    )


def _chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)


def test_chunked_bodies_are_read(url: str) -> None:
    """What is refused below is refused for its fault alone."""
    lines = ["Host: localhost", JSON, "Transfer-Encoding: chunked"]
    assert _status(exchange(url, _ask(*lines, length=False, body=_chunked(ASK[:9], ASK[9:], b"")))) == 200


@pytest.mark.parametrize(
    ("lines", "body"),
    [
        (["Transfer-Encoding: chunked", f"Content-Length: {len(ASK)}"], _chunked(ASK, b"")),
        ([f"Content-Length: {len(ASK)}", "Transfer-Encoding: chunked"], ASK),
        (["Content-Length: 5", f"Content-Length: {len(ASK)}"], ASK),
        ([f"Content-Length: {len(ASK)}", f"Content-Length: {len(ASK)}"], ASK),
        (["Content-Length: 5, 6"], ASK),
        (["Content-Length: +5"], ASK),
        (["Content-Length: -5"], ASK),
        (["Content-Length: 0x5"], ASK),
        (["Content-Length: 5 5"], ASK),
        ([f"Content-Length : {len(ASK)}"], ASK),
        ([f"Content-Length: {'9' * 4000}"], ASK),
        (["Content-Length: \xb2"], ASK),
        (["Transfer-Encoding: chunked", "Transfer-Encoding: chunked"], _chunked(ASK, b"")),
        (["Transfer-Encoding: chunked, identity"], _chunked(ASK, b"")),
        (["Transfer-Encoding: xchunked"], _chunked(ASK, b"")),
        (["Transfer-Encoding: gzip, chunked"], _chunked(ASK, b"")),
        (["Transfer-Encoding: \x0bchunked"], _chunked(ASK, b"")),
        (["Transfer-Encoding: chunked"], b"ffffffffffffffffffffffff\r\n"),
        (["Transfer-Encoding: chunked"], b"-5\r\nhello\r\n0\r\n\r\n"),
        (["Transfer-Encoding: chunked"], b"5\r\nhelloXX0\r\n\r\n"),
        (["Transfer-Encoding: chunked"], b"0x5\r\nhello\r\n0\r\n\r\n"),
        (["Transfer-Encoding: chunked"], b"5\nhello\n0\n\n" * 9000),
        (["Transfer-Encoding: chunked"], b"1\r\n \r\n" * 20_000 + _chunked(b"")),
        (["Transfer-Encoding: chunked"], _chunked(ASK) + b"0\r\n" + b"x: y\r\n" * 20_000 + b"\r\n"),
        (["X: y", " folded: z", "\tContent-Length: 5"], b""),
    ],
    ids=_short,
)
def test_doubtful_bodies_are_refused(url: str, lines: list[str], body: bytes) -> None:
    """Two lengths, a length that is none, or chunks that two readers could cut differently."""
    heard = exchange(url, _ask("Host: localhost", JSON, *lines, body=body, length=False))
    assert 400 <= _status(heard) < 502 and heard.count(b"HTTP/1.1 ") == 1


@pytest.mark.parametrize(
    "start",
    [
        *("GET http://evil.example/v1/models HTTP/1.1", "GET //evil.example/v1/models HTTP/1.1"),
        *("CONNECT evil.example:80 HTTP/1.1", "OPTIONS * HTTP/1.1", "TRACE / HTTP/1.1", "GET * HTTP/1.1"),
        *("GET /v1/models HTTP/2.0", "GET /v1/models HTTP/1.2", "GET /v1/models", "PRI * HTTP/2.0"),
        *(
            "GET /v1/../v1/models HTTP/1.1",
            "GET /v1%2fmodels%00 HTTP/1.1",
            "GET /v1/models%0d%0aX:y HTTP/1.1",
        ),
        *("GET /v1/models%1b[31m HTTP/1.1", "GET /%zz HTTP/1.1", "GET /% HTTP/1.1", "GET /%ff HTTP/1.1"),
        *("GET /v1/mo\x01dels HTTP/1.1", "GET  /v1/models HTTP/1.1", "GET\t/v1/models HTTP/1.1"),
        *("G\x00T /v1/models HTTP/1.1", "GET /v1/m\xf6dels HTTP/1.1", " GET /v1/models HTTP/1.1"),
        *(f"GET /{'a' * 70_000} HTTP/1.1", f"{'A' * 70_000} / HTTP/1.1", "GET /v1/models/%E2%80%AE HTTP/1.1"),
        *("DELETE /v1/models HTTP/1.1", "BREW /v1/models HTTP/1.1", "POST /v1/models HTTP/1.1"),
    ],
    ids=_short,
)
def test_odd_targets_and_methods_are_refused(url: str, start: str) -> None:
    """Each with one error reply, and none gets the list of models."""
    heard = exchange(url, _raw(start, "Host: localhost", JSON))
    assert 400 <= _status(heard) < 506 and heard.count(b"HTTP/1.1 ") == 1 and b'"tiny"' not in heard


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /healthz HTTP/1.1\nHost: localhost\n\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX\x00: y\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: \x00\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n: y\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 100 + b"\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 30_000 + b"\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc",
        b"GET /healthz HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"\r\n" * 40_000,
    ],
    ids=_short,
)
def test_odd_heads_are_refused(url: str, raw: bytes) -> None:
    """Line ends, names, sizes and numbers of fields."""
    assert 400 <= _status(exchange(url, raw)) < 432


def test_smuggled_requests_are_not_answered(url: str) -> None:
    """What follows a refused request on its connection is no request."""
    hidden = _raw("GET /v1/models HTTP/1.1", "Host: localhost")
    first = _ask("Host: localhost", JSON, "Transfer-Encoding: chunked", body=_chunked(b"") + hidden)
    heard = exchange(url, first)
    assert heard.count(b"HTTP/1.1 ") == 1 and _status(heard) == 400 and b'"list"' not in heard


def test_pipelined_requests_are_answered_in_order(url: str) -> None:
    """One after the other, whatever the first one costs; a fault in the second spoils no first answer."""
    health = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    heard = exchange(url, post(CHAT, ASK) + health + _raw("GET /none HTTP/1.1", "Host: localhost"))
    assert [int(part[:3]) for part in heard.split(b"HTTP/1.1 ")[1:]] == [200, 200, 404]
    heard = exchange(url, post(CHAT, ASK) + b"\x00garbage\r\n\r\n")
    assert [int(part[:3]) for part in heard.split(b"HTTP/1.1 ")[1:]] == [200, 400]


def test_upgrades_are_not_followed(url: str) -> None:
    """h2c and WebSocket stay HTTP/1.1."""
    for kind in ("h2c", "websocket"):
        lines = [f"Upgrade: {kind}", "HTTP2-Settings: AAMAAABkAAQAAP__"]
        request = "\r\n".join(
            ["GET /healthz HTTP/1.1", "Host: localhost", "Connection: Upgrade, close", *lines, "", ""]
        )
        assert _status(exchange(url, request.encode())) == 200


def test_http_1_0_and_head(url: str) -> None:
    """Answered without chunks, and without a body."""
    heard = exchange(url, b"GET /healthz HTTP/1.0\r\n\r\n")
    assert _status(heard) == 200 and heard.endswith(b"}")
    streamed = json.dumps({**json.loads(ASK), "stream": True}).encode()
    heard = exchange(url, post(CHAT, streamed).replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    assert heard.endswith(b"data: [DONE]\n\n") and b"chunked" not in heard
    heard = exchange(url, _raw("HEAD /healthz HTTP/1.1", "Host: localhost"))
    assert heard.startswith(b"HTTP/1.1 200 ") and heard.endswith(b"\r\n\r\n")


def test_expect_continue(url: str) -> None:
    """A client that asks first is told to go on, or at once why not."""
    asked = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n{JSON}\r\nExpect: 100-continue\r\nConnection: close\r\n"
    )
    with socket.create_connection(("127.0.0.1", port_of(url)), timeout=60) as connection:
        connection.sendall(f"{asked}Content-Length: {len(ASK)}\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
        connection.sendall(ASK)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
    assert _status(exchange(url, f"{asked}Content-Length: 99999999\r\n\r\n".encode())) == 413


def test_allowed_names() -> None:
    """Names that the owner gives are served, beside loopback's; what is no name is refused at the start."""
    model = ReferenceModel(scripted_model({}))
    with serving(model, allow_hosts=["Pi.local", "2001:db8::7"]) as base:
        for host, status in [("pi.local:9000", 200), ("[2001:db8::7]", 200), ("localhost", 200), ("pi", 403)]:
            assert _status(exchange(base, _raw("GET /healthz HTTP/1.1", f"Host: {host}"))) == status
    with serving(ReferenceModel(scripted_model({})), allow_hosts=["*"]) as base:
        assert _status(exchange(base, _raw("GET /healthz HTTP/1.1", "Host: evil.example"))) == 200
    for name in ("", "a b", "http://pi.local", "pi.local:9000", "x" * 300):
        with pytest.raises(InputError, match="allow_hosts"), serving(model, allow_hosts=[name]):
            pass


def test_a_token_is_demanded_before_the_body() -> None:
    """Of an endless body nothing is read without it; told twice it is none."""
    with serving(ReferenceModel(scripted_model({})), auth_token="right") as base:
        lines = ["Host: localhost", JSON, "Content-Length: 4000000"]
        assert _status(exchange(base, _ask(*lines, length=False, body=b""))) == 401
        lines = ["Authorization: Bearer right", "Authorization: Bearer right"]
        assert _status(exchange(base, _raw("GET /v1/models HTTP/1.1", "Host: localhost", *lines))) == 401
        assert _status(exchange(base, _raw("GET /v1/%6dodels HTTP/1.1", "Host: localhost"))) == 401
        assert _status(exchange(base, _raw("GET /v1/models HTTP/1.1", "Host: localhost", lines[0]))) == 200
