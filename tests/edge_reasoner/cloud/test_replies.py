"""Replies in the shapes that real endpoints send: failures are errors, odd side fields cost nothing."""

from __future__ import annotations

import gzip
import json
import zlib

import pytest
from support.hostile_cloud import GOOD, HEAD, drip, event, hang, hostile_cloud, reset, send, status

from edge_reasoner.chat.model import Usage
from edge_reasoner.cloud.base import CloudLimits
from edge_reasoner.errors import CloudProtocolError, CloudUnavailableError, NoAnswerError

DONE = b"data: [DONE]\n\n"
BODY = GOOD.removeprefix(HEAD)


def _chunk(delta: object, finish: object = None, **more: object) -> bytes:
    return _event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more})


def _event(value: object) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def _head(*headers: str) -> bytes:
    return "\r\n".join(["HTTP/1.1 200 OK", *headers, "Connection: close", "", ""]).encode()


def _raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("reply", "said"),
    {
        "error beside choices": (
            HEAD + event("x") + event("", error={"message": "it died"}) + DONE,
            "it died",
        ),
        "error as a string": (HEAD + _event({"error": "it died"}), "it died"),
        "error in a choice": (HEAD + _event({"choices": [{"error": {"message": "it died"}}]}), "it died"),
        "error object": (HEAD + _event({"object": "error", "message": "it died"}) + DONE, "it died"),
        "error event": (HEAD + event("x") + b"event: error\ndata: it died\n\n" + DONE, "it died"),
        "error after the finish": (
            HEAD + event("x", "stop") + _event({"error": {"message": "it died"}}),
            "it died",
        ),
        "error in JSON": (status(200, body=b'{"error": {"message": "it died"}}'), "it died"),
        "error in a list": (status(200, body=b'[{"error": {"message": "it died"}}]'), "it died"),
        "finish reason": (HEAD + event("half") + event(None, "error") + DONE, "error"),
        "finish reason of a gateway": (
            HEAD + event("half") + event(None, "network_error") + DONE,
            "network_error",
        ),
        "nothing": (HEAD + DONE, "empty"),
        "nothing, explained": (HEAD + _event({"detail": "model is loading"}) + DONE, "model is loading"),
        "half, then a remark": (HEAD + event("x") + _event({"detail": "it died"}) + DONE, "it died"),
        "half, then a code": (
            HEAD + event("x") + _event({"code": 500, "message": "it died"}) + DONE,
            "it died",
        ),
        "half, then errors": (
            HEAD + event("x") + _event({"errors": [{"message": "it died"}]}) + DONE,
            "it died",
        ),
        "error without data:": (
            HEAD + event("x") + b'{"error": {"message": "it died"}}\n\n' + DONE,
            "it died",
        ),
        "error as a field": (
            HEAD + event("x") + b'error: {"code": 500, "message": "it died"}\n\n' + DONE,
            "it died",
        ),
        "error event without data": (HEAD + event("x") + b"event: error\n\n" + DONE, "reports an error"),
        "event of another name": (
            HEAD + event("x") + b"event: server_error\ndata: it died\n\n" + DONE,
            "it died",
        ),
        "error of a vendor": (
            HEAD + event("x") + _event({"choices": [], "x_groq": {"error": "it died"}}),
            "it died",
        ),
        "error in a delta": (HEAD + event("x") + _chunk({"error": {"message": "it died"}}) + DONE, "it died"),
        "text as data": (HEAD + b"data: Internal Server Error\n\n" + DONE, "Internal Server Error"),
        "status failed": (
            status(200, body=b'{"status": "failed", "choices": [{"message": {"content": "half"}}]}'),
            "failed",
        ),
        "finish reason in an object": (HEAD + event("x") + _chunk({}, {"type": "abort"}) + DONE, "abort"),
        "finish reason of a provider": (
            HEAD + event("x") + event(None, "upstream_timeout") + DONE,
            "timeout",
        ),
        "a page": (_head() + b"<!DOCTYPE html><html>please log in</html>", "HTML"),
        "a page called a stream": (HEAD + b"\n<?xml version='1.0'?><Error/>", "HTML or XML"),
        "only spaces": (HEAD + event(" \n", "stop") + DONE, "empty"),
        "only thoughts": (HEAD + _chunk({"reasoning_content": "hm"}) + event(None, "length"), "more tokens"),
        "only tools": (HEAD + _chunk({"tool_calls": [{}]}, "tool_calls") + DONE, "tools"),
        "withheld": (HEAD + event(None, "content_filter") + DONE, "withheld"),
        "no choices in JSON": (status(200, body=b'{"choices": []}'), "empty"),
        "JSON cut off": (_head("Content-Type: application/json") + b'{"choices": [{"mess', "not JSON"),
        "too long": (HEAD + event("x" * 600_000) + event("x" * 600_000) + DONE, "1000000 characters"),
        "zip bomb": (
            _head("Content-Type: text/event-stream", "Content-Encoding: gzip")
            + gzip.compress((b": " + b"o" * 100_000 + b"\n") * 240),
            "more than 16777216 bytes",
        ),
    }.items(),
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_failure_is_not_an_answer(ask, reply, said) -> None:
    """Whatever says that the endpoint failed, or ends without an answer, is an error with what was said."""
    expected_reply, expected_text = said
    with hostile_cloud(send(expected_reply)) as server, pytest.raises(CloudProtocolError) as caught:
        ask(server.url)
    kind = NoAnswerError if reply == "only thoughts" else CloudProtocolError
    assert type(caught.value) is kind and expected_text in str(caught.value)


@pytest.mark.parametrize(
    "reply",
    [
        HEAD + event("half"),
        HEAD + event("half")[:-9],
        HEAD + event("half") + _event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}),
        _head("Content-Type: text/event-stream", "Content-Encoding: gzip") + gzip.compress(BODY)[:-30],
        _head("Content-Type: application/json", "Content-Length: 900") + b'{"choices"',
    ],
)
def test_unfinished_is_not_an_answer(ask, reply) -> None:
    """A stream without finish reason and [DONE], or a reply that is cut off, is no answer."""
    with hostile_cloud(send(reply)) as server, pytest.raises(CloudUnavailableError):
        ask(server.url)


@pytest.mark.parametrize(
    "reply",
    {
        "JSON": status(
            200, body=b'{"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}'
        ),
        "JSON called a stream": HEAD + b'{"choices": [{"message": {"content": "Hello"}}]}',
        "stream called JSON": _head("Content-Type: application/json; charset=utf-8") + BODY,
        "stream without a type": _head() + BODY,
        "gzip": _head("Content-Type: text/event-stream", "Content-Encoding: gzip") + gzip.compress(BODY),
        "deflate": _head("Content-Type: text/event-stream", "Content-Encoding: deflate")
        + zlib.compress(BODY),
        "raw deflate": _head("Content-Encoding: deflate") + _raw_deflate(BODY),
        "BOM": HEAD + b"\xef\xbb\xbf" + BODY,
        "BOM before JSON": status(200, body=b'\xef\xbb\xbf {"choices": [{"message": {"content": "Hello"}}]}'),
        "CR": HEAD + BODY.replace(b"\n", b"\r"),
        "pings": HEAD + b": hi\n\nevent: ping\ndata: now\n\ndata\n\ndata:\n\nevent: x\ndata: y\n\n" + BODY,
        "no last empty line": HEAD + BODY.rstrip(b"\n"),
        "delta null": HEAD + _event({"choices": [{"index": 0, "delta": None}]}) + BODY,
        "choices null": HEAD + event("Hello") + _event({"choices": None}) + event(None, "stop"),
        "no [DONE]": HEAD + event("Hello") + event(None, "stop"),
        "no finish": HEAD + event("Hello") + DONE,
        "several answers": HEAD
        + _event(
            {
                "choices": [
                    {"index": 1, "delta": {"content": "no"}},
                    {"index": 0, "delta": {"content": "Hello"}},
                ]
            }
        )
        + DONE,
        "whole message at the end": HEAD
        + event("Hello")
        + _event({"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}),
        "message after message": HEAD
        + _event({"choices": [{"message": {"content": "Hel"}}]})
        + _event({"choices": [{"message": {"content": "lo"}}]})
        + DONE,
        "messages that grow": HEAD
        + _event({"choices": [{"message": {"content": "Hel"}}]})
        + _event({"choices": [{"message": {"content": "Hello"}}]})
        + DONE,
        "no empty lines": HEAD + BODY.replace(b"\n\n", b"\n"),
        "no empty lines, no [DONE]": HEAD + (event("Hello") + event(None, "stop")).replace(b"\n\n", b"\n"),
        "data: twice": HEAD + BODY.replace(b"data: ", b"data: data: "),
        "Data:, indented": HEAD + BODY.replace(b"data: ", b" Data: "),
        "BOM at each event": HEAD + BODY.replace(b"data: ", b"\xef\xbb\xbfdata: "),
        "JSON lines": _head() + BODY.replace(b"data: ", b"").replace(b"\n\n", b"\n"),
        "comments before JSON": _head("Content-Type: application/json")
        + b": PROCESSING\n\n: PROCESSING\n\n"
        + b'{"choices": [{"message": {"content": "Hello"}, "finish_reason": "stop"}]}',
        "[DONE] in quotes": HEAD + event("Hello") + b'data: "[DONE]"\n\n',
        "[done] without data:": HEAD + event("Hello") + b"[done]\n\n",
        "garbage after the end": HEAD + event("Hello", "stop") + b"data: {garbage\n\n",
        "counted from 1": HEAD
        + _event({"choices": [{"index": 1, "delta": {"content": "Hello"}}]})
        + _event({"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]}),
        "another answer later": HEAD
        + event("Hello")
        + _event({"choices": [{"index": 1, "delta": {"content": "no"}, "finish_reason": "stop"}]})
        + DONE,
        "delta as text": HEAD + _chunk("Hello", "stop"),
        "delta an empty list": HEAD + _chunk([]) + BODY,
        "message as text": status(200, body=b'{"choices": [{"message": "Hello", "finish_reason": "stop"}]}'),
        "choices of nothing": HEAD + _event({"choices": {}}) + _event({"choices": [None]}) + BODY,
        "part of nothing": HEAD + _chunk({"content": [None, {}, {"type": "text", "text": "Hello"}]}, "stop"),
        "part with content": HEAD + _chunk({"content": [{"type": "text", "content": "Hello"}]}, "stop"),
        "part of a delta": HEAD + _chunk({"content": [{"type": "text_delta", "text": "Hello"}]}, "stop"),
        "finish in the delta": HEAD + _chunk({"content": "Hello", "finish_reason": "stop"}),
        "stop reason": HEAD
        + _event({"choices": [{"delta": {"content": "Hello"}, "stop_reason": "end_turn"}]}),
        "error without meaning": HEAD
        + event("Hello", error="null")
        + event(None, "stop", error={"code": 0, "message": "success"}),
        "wrapped": HEAD
        + _event(
            {"code": 0, "data": {"choices": [{"delta": {"content": "Hello"}, "finish_reason": "stop"}]}}
        ),
        "encoding utf-8": _head("Content-Encoding: utf-8") + BODY,
        "encoding none": _head("Content-Encoding: none") + BODY,
        "text choice": HEAD + _event({"choices": [{"text": "Hello", "finish_reason": "stop"}]}) + DONE,
        "odd finish": HEAD + _chunk({"content": "Hello"}, {"type": "stop"}),
        "error null": HEAD
        + event("Hello", "stop", error=None)
        + _event({"error": {"message": "", "code": 0}}),
        "odd names": HEAD + _chunk({"content": "Hello"}, "stop", model={"a": 1}, id=7, created="now"),
        "NaN": HEAD + event("Hello", "stop").replace(b'"m"', b'NaN, "x": [Infinity, ' + b"9" * 5000 + b"]"),
    }.items(),
    ids=lambda item: item[0],
)
def test_framing_and_side_fields_lose_no_text(ask, reply) -> None:
    """All of these say "Hello"."""
    with hostile_cloud(send(reply[1])) as server:
        assert ask(server.url).text == "Hello"


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2}, Usage(5, 2)),
        ({"prompt_tokens": 5.0, "completion_tokens": 2.0}, Usage(5, 2)),
        ({"input_tokens": 5, "output_tokens": 2}, Usage(5, 2)),
        (
            {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 9}},
            Usage(5, 2, 5),
        ),
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": 3}, Usage(5, 2)),
        *(
            (value, None)
            for value in (
                {},
                None,
                7,
                "many",
                [1, 2],
                {"prompt_tokens": 5},
                {"prompt_tokens": "5", "completion_tokens": "2"},
                {"prompt_tokens": -1, "completion_tokens": 2},
                {"prompt_tokens": 0.5, "completion_tokens": 2},
                {"prompt_tokens": True, "completion_tokens": 2},
                {"prompt_tokens": 10**30, "completion_tokens": 2},
                {"prompt_tokens": {"n": 5}, "completion_tokens": 2},
                {"prompt_tokens": float("nan"), "completion_tokens": float("inf")},
            )
        ),
    ],
)
def test_usage_is_counts_or_unknown(ask, usage, expected) -> None:
    """Counts are taken where they are counts; anything else is unknown and costs no text."""
    reply = HEAD + event("Hello") + event(None, "stop") + _event({"choices": [], "usage": usage}) + DONE
    with hostile_cloud(send(reply)) as server:
        result = ask(server.url)
    assert (result.text, result.usage) == ("Hello", expected)


@pytest.mark.parametrize(
    "deltas",
    [
        [{"reasoning_content": "so "}, {"reasoning_content": "it is"}, {"content": "42"}],
        [{"reasoning": "so it is", "reasoning_content": "so it is"}, {"content": "42", "reasoning": None}],
        [
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "so it is"}]}]},
            {"content": "42"},
        ],
        [{"content": [{"type": "reasoning", "text": "so it is"}, {"type": "text", "text": "4"}, "2"]}],
        [{"content": [{"text": "so it is", "thought": True}, {"text": "42"}]}],
        [{"content": [{"type": "thinking_delta", "thinking": "so it is"}, {"type": "text", "text": "42"}]}],
        [{"reasoning": {"text": "so it is"}}, {"content": "42"}],
        [{"reasoning_details": [{"type": "reasoning.text", "text": "so it is"}]}, {"content": "42"}],
        [{"content": [{"type": "image_url", "image_url": {}}, {"type": "text", "text": {"value": "42"}}]}],
    ],
)
def test_thinking_is_not_the_answer(ask, deltas) -> None:
    """Reasoning fields and parts are collected apart; parts that are neither text nor thought are skipped."""
    reply = HEAD + b"".join(_chunk(delta) for delta in deltas) + event(None, "stop")
    with hostile_cloud(send(reply)) as server:
        result = ask(server.url)
    assert result.text == "42"
    assert result.thinking == (None if "image_url" in str(deltas) else "so it is")


def test_a_refusal_is_what_the_model_answers(ask) -> None:
    """A refusal field is the answer's text, and the finish reason says what it is."""
    with hostile_cloud(send(HEAD + _chunk({"refusal": "I may not."}) + event(None, "stop") + DONE)) as server:
        result = ask(server.url)
    assert (result.text, result.finish_reason) == ("I may not.", "refusal")


def test_texts_can_be_encoded(ask) -> None:
    """A character in two halves is joined, lone halves and broken UTF-8 become U+FFFD; the rest is kept."""
    deltas = [rb"a\ud83d", rb"\ude00b\ud800", b"\xff", rb"\u0000\u001b[31m"]
    reply = (
        HEAD
        + b"".join(b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % text for text in deltas)
        + DONE
    )
    with hostile_cloud(send(reply)) as server:
        result = ask(server.url)
    assert result.text == "a😀b\ufffd\ufffd\0\x1b[31m"


@pytest.mark.parametrize("end", [hang, reset])
def test_an_answer_that_is_whole_survives_its_connection(ask, end) -> None:
    """After the finish reason only counts are missing: a connection that breaks or stalls costs nothing."""
    with hostile_cloud(end(HEAD + event("Hello", "length"))) as server:
        result = ask(server.url, limits=CloudLimits(read_s=1.0, settle_s=1.0, attempts=1))
    assert (result.text, result.finish_reason) == ("Hello", "length")


def test_a_server_that_never_closes_is_not_waited_for(ask) -> None:
    """Comments without end after the finish reason hold nobody up: `settle_s` bounds the wait for counts."""

    def act(connection) -> None:
        connection.sendall(HEAD + event("Hello", "stop"))
        drip(b": ping\n")(connection)

    with hostile_cloud(act) as server:
        assert ask(server.url, limits=CloudLimits(settle_s=0.1, total_s=60, attempts=1)).text == "Hello"
