"""Fuzzers of what clients send to the reference server: whole requests, and bodies."""

from __future__ import annotations

import json

import h11
import pytest
from hostile.fuzz.mutate import FEW, MANY, check

from edge_reasoner.errors import InputError
from edge_reasoner.server.guard import Guard, Head, check_lines
from edge_reasoner.server.limits import HttpLimits
from edge_reasoner.server.protocol import ChatBody, CompletionBody, RequestError, parse_body

LIMITS = HttpLimits()
GUARD = Guard(LIMITS, auth_token="secret")
MESSAGES = [
    {"role": "system", "content": "x"},
    {"role": "user", "content": [{"type": "text", "text": "é🙂"}]},
]
CHAT = {
    "model": "m",
    "messages": MESSAGES,
    "temperature": 0.5,
    "max_completion_tokens": 9,
    "stop": ["a"],
    "seed": 3,
}
COMPLETION = {
    "model": "m",
    "prompt": "hi",
    "stream": True,
    "stream_options": {"include_usage": True},
    "top_p": 1,
}


def _request(body: bytes, *more: bytes) -> bytes:
    lines = [
        b"POST /v1/chat/completions?x=%20 HTTP/1.1",
        b"Host: localhost:9000",
        b"Authorization: Bearer secret",
    ]
    return b"\r\n".join([*lines, b"Content-Type: application/json", *more, b"", b""]) + body


def fuzz_server_body(data: bytes) -> None:
    """A body as the server reads it: parameters come out, or a refusal in one line."""
    try:
        if b"prompt" in data:
            parse_body(data, CompletionBody).params(None)
        else:
            body = parse_body(data, ChatBody)
            body.params(body.max_completion_tokens)
            assert all(isinstance(message["content"], str) for message in body.chat())
    except RequestError as error:
        json.dumps(error.body())
        raise InputError("refused") from error


def fuzz_server_request(data: bytes) -> None:
    """A request's bytes through the reader of HTTP and the guard, then its body."""
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=LIMITS.head_bytes)
    try:
        check_lines(data)
        connection.receive_data(data)
        connection.receive_data(b"")
        event = connection.next_event()
        if not isinstance(event, h11.Request):
            raise InputError("no request")
        text = (value.decode("latin-1") for value in (event.method, event.target, event.http_version))
        GUARD.check(Head(*text, [(bytes(name), bytes(value)) for name, value in event.headers], "127.0.0.1"))
        body = bytearray()
        while isinstance(event := connection.next_event(), h11.Data):
            body += event.data
    except h11.RemoteProtocolError as error:
        raise InputError("not HTTP") from error
    except RequestError as error:
        json.dumps(error.body())
        raise InputError("refused") from error
    fuzz_server_body(bytes(body))


_chat, _completion = json.dumps(CHAT).encode(), json.dumps(COMPLETION).encode()
_chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(_chat), _chat)
FORMATS = {
    "body": (fuzz_server_body, [_chat, _completion]),
    "request": (
        fuzz_server_request,
        [
            _request(_chat, b"Content-Length: %d" % len(_chat)),
            _request(_chunked, b"Transfer-Encoding: chunked"),
        ],
    ),
}
WORDS = (
    *(b"Content-Length: 5", b"Transfer-Encoding: chunked", b"\r\n", b"\r\n\r\n", b"HTTP/1.0"),
    *(b"Origin: x", b"9" * 5000),
    *(b"Host:", b"[::1]", b"%00", b"/healthz", b"GET", b'"messages"', b'"logprobs"', b'"n"', b"0" * 30),
)


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMATS)
def test_fuzz(name: str, count: int) -> None:
    """Only refusals, no hang, no growth."""
    target, seeds = FORMATS[name]
    check(target, seeds, count, seed=int(count > FEW), words=WORDS)
