"""The cloud client against small real servers that misbehave."""

from __future__ import annotations

import json
import socket
import threading
from dataclasses import replace

import pytest
from support.hostile_cloud import (
    GOOD,
    HEAD,
    drip,
    event,
    flood,
    hang,
    hostile_cloud,
    reset,
    send,
    status,
)

from edge_reasoner.chat.model import ChatRequest, Usage
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.cloud import connect
from edge_reasoner.cloud.base import CloudLimits, CloudOptions, CloudPrice
from edge_reasoner.cloud.openai_protocol import OpenAIModel
from edge_reasoner.errors import CloudError, CloudProtocolError, CloudUnavailableError, InputError

DEFAULTS = SamplingParams()
MESSAGES = [{"role": "user", "content": "größe?"}]
#: far more time than a server on loopback takes, however busy the machine is
LIMITS = CloudLimits(
    connect_s=20.0,
    read_s=20.0,
    total_s=60.0,
    attempts=2,
    backoff_base_s=0.01,
    line_bytes=20_000,
    response_bytes=200_000,
)
#: for servers that fall silent
IMPATIENT = replace(LIMITS, read_s=1.0, total_s=2.5)


def _model(url: str, **options) -> OpenAIModel:
    return OpenAIModel(CloudOptions(url, model="m", **{"limits": LIMITS, **options}))


def _ask(params: SamplingParams = DEFAULTS, **extra) -> ChatRequest:
    return ChatRequest(tuple(MESSAGES), params=params, extra=extra)


def _read(url: str, params: SamplingParams = DEFAULTS, **options):
    model = _model(url, **options)
    try:
        stream = model.submit(_ask(params))
        return list(stream), stream.result()
    finally:
        model.close()


def test_streams_text_and_sends_what_was_asked() -> None:
    """The texts arrive in order; the request carries the parameters, and the key only as a header."""
    params = SamplingParams(temperature=0.5, max_tokens=9, stop=("x",), seed=4)
    with hostile_cloud(send(GOOD)) as server:
        environment = {"KEY": "secret-key"}
        texts, result = _read(server.url, params, api_key_env="KEY", environment=environment)
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
    sent = json.loads(body)
    assert (texts, result.finish_reason, result.model) == (["Hel", "lo"], "stop", "m")
    assert sent["messages"] == MESSAGES and sent["stream"] is True
    assert (sent["temperature"], sent["max_tokens"], sent["stop"], sent["seed"]) == (0.5, 9, ["x"], 4)
    assert b"Authorization: Bearer secret-key" in head and b"secret-key" not in body


def test_usage_and_price() -> None:
    """Token counts come from the last chunk; the price is per million tokens."""
    usage = event(None, usage={"prompt_tokens": 10, "completion_tokens": 5})
    with hostile_cloud(send(HEAD + event("a", "length") + usage + b"data: [DONE]\n\n")) as server:
        _, result = _read(server.url)
    assert result.usage == Usage(10, 5) and result.finish_reason == "length"
    assert CloudPrice(1.0, 2.0).cost_usd(Usage(10, 5)) == pytest.approx(20e-6)


@pytest.mark.parametrize(
    "first",
    {
        "429": send(status(429)),
        "503": send(status(503)),
        "reset": reset(),
        "reset in the head": reset(HEAD[:20]),
        "closed": send(b""),
        "hang": hang(),
        "hang after head": hang(HEAD),
        "stream cut before any text": send(HEAD),
    }.items(),
    ids=lambda item: item[0],
)
def test_retries_while_nothing_was_shown(first) -> None:
    """One failure of a passing kind is retried, and the second attempt's answer is whole."""
    with hostile_cloud(first[1], send(GOOD)) as server:
        texts, _ = _read(server.url, limits=IMPATIENT if "hang" in first[0] else LIMITS)
        assert texts == ["Hel", "lo"] and len(server.requests) == 2


@pytest.mark.parametrize(
    ("name", "case"),
    {
        "hang": (hang(), CloudUnavailableError),
        "reset": (reset(), CloudUnavailableError),
        "429 storm": (send(status(429)), CloudUnavailableError),
        "long Retry-After": (send(status(429, "Retry-After: 3600\r\n")), CloudUnavailableError),
        "500": (send(status(500, body=b"<html>")), CloudUnavailableError),
        "401": (send(status(401)), CloudProtocolError),
        "404": (send(status(404)), CloudProtocolError),
        "redirect": (send(status(302, "Location: http://127.0.0.1:1/\r\n")), CloudProtocolError),
        "not HTTP": (send(b"SSH-2.0-OpenSSH_9.6\r\n"), CloudUnavailableError),
        "binary": (send(bytes(range(256)) * 50), CloudUnavailableError),
        "wrong content type": (send(GOOD.replace(b"text/event-stream", b"text/html")), CloudProtocolError),
        "whole JSON": (send(status(200, body=b'{"choices": []}')), CloudProtocolError),
        "called compressed": (
            send(GOOD.replace(b"Connection", b"Content-Encoding: gzip\r\nConnection")),
            CloudUnavailableError,
        ),
        "unknown compression": (
            send(GOOD.replace(b"Connection", b"Content-Encoding: br\r\nConnection")),
            CloudProtocolError,
        ),
        "garbage events": (send(HEAD + b"data: {garbage\n\n"), CloudProtocolError),
        "wrong types": (send(HEAD + b'data: {"choices": 7}\n\n'), CloudProtocolError),
        "null": (send(HEAD + b"data: null\n\n"), CloudProtocolError),
        "wrong content": (
            send(HEAD + b'data: {"choices":[{"delta":{"content":{}}}]}\n\n'),
            CloudProtocolError,
        ),
        "deep": (send(HEAD + b"data: " + b"[" * 15_000 + b"\n\n"), CloudProtocolError),
        "not UTF-8": (send(HEAD + b"data: \xff\xfe\n\n"), CloudProtocolError),
        "error event": (
            send(HEAD + b'data: {"error": {"message": "out of memory"}}\n\n'),
            CloudProtocolError,
        ),
        "huge line": (flood(HEAD + b"data: ", b"a" * 10_000), CloudProtocolError),
        "endless comments": (flood(HEAD, b": ping\n" * 1000), CloudProtocolError),
        "endless stream": (flood(HEAD, event("a") * 100), CloudProtocolError),
        "endless header": (flood(b"HTTP/1.1 200 OK\r\nX: ", b"a" * 10_000), CloudUnavailableError),
        "dripped header": (drip(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 9000), CloudUnavailableError),
        "dripped stream": (lambda c: (c.sendall(HEAD), drip(b": a\n")(c)), CloudUnavailableError),
        "bad chunking": (
            send(HEAD.replace(b"Connection: close", b"Transfer-Encoding: chunked") + b"zz\r\n"),
            CloudUnavailableError,
        ),
    }.items(),
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_misbehaviour_is_one_clear_error(name, case) -> None:
    """Every kind of misbehaviour ends, in one line of the right class."""
    act, expected_error = case
    limits = IMPATIENT if name == "hang" or "dripped" in name else LIMITS
    with hostile_cloud(act) as server, pytest.raises(CloudError) as caught:
        _read(server.url, limits=limits)
    assert type(caught.value) is expected_error
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "act", [reset(HEAD + event("Hel")), send(HEAD + event("Hel")), hang(HEAD + event("Hel"))]
)
def test_no_retry_after_text_was_shown(act) -> None:
    """A stream that breaks after its first text is not repeated: the error comes through."""
    with hostile_cloud(act, send(GOOD)) as server:
        model = _model(server.url, limits=IMPATIENT)
        stream = model.submit(_ask())
        assert next(stream) == "Hel"
        with pytest.raises(CloudUnavailableError):
            next(stream)
        assert len(server.requests) == 1
        model.close()


def test_unreachable() -> None:
    """Nobody listens: unavailable, after the allowed attempts."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with pytest.raises(CloudUnavailableError, match=f"127.0.0.1:{port}"):
        _read(f"http://127.0.0.1:{port}/v1")


def test_retry_after_is_honoured_and_jitter_is_full() -> None:
    """The wait is the server's wish plus a uniform share of the growing back-off."""
    waits: list[float] = []
    options = CloudOptions("", model="m", limits=CloudLimits(attempts=3, backoff_base_s=1.0))
    with hostile_cloud(send(status(429, "Retry-After: 2\r\n")), send(status(503)), send(GOOD)) as server:
        model = OpenAIModel(
            CloudOptions(server.url, model="m", limits=options.limits),
            sleep=waits.append,
            uniform=lambda low, high: low + 0.5 * (high - low),
        )
        assert "".join(model.submit(_ask())) == "Hello"
        model.close()
    assert waits == [2.5, 1.0]


def test_model_name_is_asked_for_once() -> None:
    """Without a model name the first listed one is used, and remembered."""
    listed = send(status(200, body=b'{"object": "list", "data": [{"id": "big"}, {"id": "small"}]}'))
    with hostile_cloud(listed, send(GOOD)) as server:
        model = OpenAIModel(CloudOptions(server.url, limits=LIMITS))
        for _ in range(2):
            assert "".join(model.submit(_ask())) == "Hello"
        assert [json.loads(r.partition(b"\r\n\r\n")[2])["model"] for r in server.requests[1:]] == [
            "big",
            "big",
        ]
        model.close()


@pytest.mark.parametrize("body", [b"{}", b"[]", b'{"data": []}', b'{"data": [{"id": 5}]}', b"x" * 2_000_000])
def test_malformed_model_list(body: bytes) -> None:
    """A model list that is none is a protocol error."""
    with hostile_cloud(send(status(200, body=body))) as server:
        model = OpenAIModel(CloudOptions(server.url, limits=LIMITS))
        with pytest.raises(CloudProtocolError):
            next(model.submit(_ask()))
        model.close()


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://x/v1",
        "http://",
        "nonsense",
        "http://u:p@host/v1",
        "http://[::1/v1",
        "http://h:65536/v1",
    ],
)
def test_bad_urls_are_refused(url: str) -> None:
    """A URL that cannot be an endpoint, or carries a secret, is an InputError before anything is sent."""
    with pytest.raises(InputError, match="cloud URL"):
        connect(CloudOptions(url))


def test_keys_are_guarded() -> None:
    """A key never goes over plain HTTP to another machine, nor into a message; a broken one is one error.

    Neither keeps the client from being made: a device that can answer itself goes on.
    """
    for url, key, said in (
        ("http://192.0.2.1/v1", "sk-topsecret", "unencrypted"),
        ("https://192.0.2.1/v1", "sk-top\r\nX: secret", "not an API key"),
        ("https://192.0.2.1/v1", "sk-töpsecret", "not an API key"),
    ):
        with pytest.raises(CloudUnavailableError, match=said) as caught:
            _read(url, environment={"OPENAI_API_KEY": key})
        assert "secret" not in str(caught.value) and "\n" not in str(caught.value)
    assert "topsecret" not in repr(CloudOptions("", environment={"OPENAI_API_KEY": "sk-topsecret"}))


def test_unknown_protocol_is_refused() -> None:
    """The message names the protocols that exist."""
    with pytest.raises(InputError, match="openai"):
        connect(CloudOptions("http://h/v1"), protocol="smtp")


def test_cancelled_from_another_thread() -> None:
    """A reader that waits for a silent endpoint gets the answer so far, as cancelled, when told to stop."""
    with hostile_cloud(hang(HEAD + event("Hel"))) as server:
        model = OpenAIModel(CloudOptions(server.url, model="m", limits=CloudLimits(read_s=60)))
        stream = model.submit(_ask())
        assert next(stream) == "Hel"
        canceller = threading.Timer(0.1, stream.cancel)
        canceller.start()
        result = stream.result()
        canceller.join()
        model.close()
    assert (result.text, result.finish_reason, result.usage) == ("Hel", "cancelled", None)


def test_what_is_no_chat_is_refused_at_once() -> None:
    """A raw text, and messages that are no JSON, are the caller's error, before anything is sent."""
    with hostile_cloud(send(GOOD)) as server:
        model = OpenAIModel(CloudOptions(server.url, model="m"))
        with pytest.raises(InputError, match="raw text"):
            model.submit(ChatRequest(text="Once upon"))
        for content in ("\ud800", float("nan"), object()):
            with pytest.raises(InputError, match=r"JSON|must be a string"):
                model.submit(ChatRequest(({"role": "user", "content": content},)))
        model.close()
        assert not server.requests
