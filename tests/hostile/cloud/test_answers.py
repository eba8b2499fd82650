"""What counts as an answer when a cloud says too little, too much, or several things at once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hostile.cloud.misbehaviour import CHUNKED, DRIPPED, JSON_HEAD, drips, misbehaving, replies
from support.hostile_cloud import HEAD, event, status

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.cloud.base import CloudLimits, CloudOptions, CloudResult
from edge_reasoner.cloud.openai_protocol import OpenAIModel
from edge_reasoner.cloud.sse import read_events
from edge_reasoner.errors import CloudError, CloudProtocolError, CloudUnavailableError

REQUEST = ChatRequest(({"role": "user", "content": "hi"},))
DONE = b"data: [DONE]\n\n"
ERROR = b'data: {"error": {"message": "worker died"}}\n\n'
PATIENT = CloudLimits(connect_s=20, read_s=20, total_s=60, attempts=2, backoff_base_s=0.01)


def _ask(act, limits: CloudLimits = PATIENT) -> CloudResult:
    with misbehaving(act) as server:
        client = OpenAIModel(CloudOptions(server.url, "m", limits=limits))
        try:
            return client.submit(REQUEST).result()
        finally:
            client.close()


def _choice(index: int | None, text: str = "", finish: str | None = None) -> dict:
    numbered = {} if index is None else {"index": index}
    return {**numbered, "delta": {"content": text}, "finish_reason": finish}


def _chunk(*choices: dict) -> bytes:
    return b"data: " + json.dumps({"model": "m", "choices": list(choices)}).encode() + b"\n\n"


@pytest.mark.parametrize(
    "body",
    {
        "no byte": b"",
        "only [DONE]": DONE,
        "only a finish reason": event(finish="stop") + DONE,
        "an empty text": event("", "stop") + DONE,
        "spaces": event(" \n\t", "stop") + DONE,
        "characters that nobody sees": event("\u200b\u2060\ufeff\u00ad\u3164", "stop") + DONE,
        "only empty events": b"data:\n\n" * 20 + DONE,
        "only pings": b": ping\n\n" * 20,
    }.items(),
    ids=lambda item: item[0],
)
def test_an_empty_reply_is_no_answer(body) -> None:
    """However an endpoint says nothing, it is an error, streamed and whole."""
    with pytest.raises(CloudError):
        _ask(replies(HEAD + body[1]))
    if body[0] in ("spaces", "characters that nobody sees", "an empty text"):
        text = json.loads(body[1].split(b"\n")[0].removeprefix(b"data: "))["choices"][0]["delta"]["content"]
        whole = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        with pytest.raises(CloudProtocolError, match="empty"):
            _ask(replies(JSON_HEAD + json.dumps(whole).encode()))


@pytest.mark.parametrize(
    "act",
    {
        "closed": replies(HEAD + event("Hel") + event("lo", "stop")),
        "reset": replies(HEAD + event("Hel") + event("lo", "stop"), reset=True),
        "silent": replies(HEAD + event("Hel") + event("lo", "stop"), hang=True),
        "cut chunk": replies(CHUNKED + b"ffff\r\n" + event("Hello", "stop"), hang=False),
        "dripping": drips(HEAD + event("Hello", "stop"), b": ping\n\n", whole=True),
    }.values(),
    ids=["closed", "reset", "silent", "cut chunk", "dripping"],
)
def test_a_complete_answer_needs_no_done(act) -> None:
    """After the finish reason nothing that is missing costs the answer, nor does waiting for it."""
    result = _ask(act, replace(PATIENT, settle_s=0.2))
    assert (result.text, result.finish_reason) == ("Hello", "stop")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (_chunk(_choice(0, "A"), _choice(1, "x")) + _chunk(_choice(1, "y"), _choice(0, "B", "stop")), "AB"),
        (_chunk(_choice(0, "A")) + _chunk(_choice(1, "x", "stop")) + _chunk(_choice(0, "B", "stop")), "AB"),
        (_chunk(_choice(1, "A")) + _chunk(_choice(0, "x"), _choice(1, "B", "stop")), "AB"),
        (_chunk(_choice(1, "A")) + _chunk(_choice(0, "x")) + _chunk(_choice(1, "B", "stop")), "AB"),
        (_chunk(_choice(None, "A")) + _chunk(_choice(0, "B")) + _chunk(_choice(2, "x", "stop")) + DONE, "AB"),
        (_chunk(_choice(0, "A", "stop")) + _chunk(_choice(1, "x", "stop")), "A"),
    ],
)
def test_several_answers_are_not_mixed(body: bytes, expected: str) -> None:
    """Nobody asked for several: the first that begins is followed, and its own finish reason ends it."""
    assert _ask(replies(HEAD + body)).text == expected


def test_a_finish_reason_of_another_answer_ends_nothing() -> None:
    """An answer is not complete because another one is."""
    with pytest.raises(CloudUnavailableError, match="ended before"):
        _ask(replies(HEAD + _chunk(_choice(0, "A")) + _chunk(_choice(1, "x", "stop"))))


@pytest.mark.parametrize(
    "body",
    [
        event("Hel") + ERROR,
        event("Hel") + ERROR + DONE,
        event("Hello", "stop") + ERROR,
        event("Hello", "stop") + ERROR + DONE,
        event("Hello") + event(finish="stop") + b'event: error\ndata: {"message": "worker died"}\n\n',
        event("Hello", "stop") + b'data: {"choices": [], "error": "worker died"}\n\n' + DONE,
        event("Hello", "stop") + event(None, "error") + DONE,
        event("Hello", "stop") + b"error: worker died\n\n",
    ],
)
def test_a_late_error_is_not_lost(body: bytes) -> None:
    """A failure that is reported after text, or after the finish reason, is one."""
    with pytest.raises(CloudProtocolError, match=r"worker died|'error'"):
        _ask(replies(HEAD + body))


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # text goes on after a finish reason, of every chunk or of an early one
        (event("Hel", "stop") + event("lo", "stop") + DONE, ("Hello", "stop")),
        (event("Hel", "stop") + event("lo") + DONE, ("Hello", "stop")),
        (event("Hel", "stop") + event("lo", "length") + DONE, ("Hello", "length")),
        (event("Hel", "length") + event("lo", "stop") + DONE, ("Hello", "stop")),
        (event("Hel", "length") + event("lo") + event(None, "stop") + DONE, ("Hello", "stop")),
        # two finish reasons, nothing between them: the one that tells more
        (event("Hello", "length") + event(None, "stop") + DONE, ("Hello", "length")),
        (event("Hello", "length") + event("", "stop") + DONE, ("Hello", "length")),
        (event("Hello", "stop") + event(None, "length") + DONE, ("Hello", "length")),
        (event("Hello", "stop") + event(None, "content_filter") + DONE, ("Hello", "content_filter")),
    ],
)
def test_what_comes_after_a_finish_reason(body: bytes, expected: tuple[str, str]) -> None:
    """No text is lost, and the finish reason is that of the end."""
    result = _ask(replies(HEAD + body))
    assert (result.text, result.finish_reason) == expected


def test_text_after_a_finish_reason_is_waited_for() -> None:
    """An endpoint that ends every chunk with a reason is not cut while it goes on."""

    def slowly(connection) -> None:
        import time

        from hostile.cloud.misbehaviour import read_request

        read_request(connection)
        connection.sendall(HEAD)
        for _ in range(12):
            connection.sendall(event("a", "stop"))
            time.sleep(0.1)
        connection.sendall(DONE)

    # as a whole this takes longer than an end that is silent
    assert _ask(slowly, CloudLimits(**{**PATIENT.__dict__, "settle_s": 1.0})).text == "a" * 12


@pytest.mark.parametrize("empty", [b"data:\n\n", b"data: \n\n", b"data\n\n", b"DATA:\n\n\n"])
def test_empty_events_cost_nothing(empty: bytes) -> None:
    """6 MB of events without a word are passed over at once, and an answer among them is read."""
    whole = empty * (6_000_000 // len(empty)) + event("Hello", "stop") + empty * 9 + DONE
    chunks = [whole[at : at + 65536] for at in range(0, len(whole), 65536)]
    events = list(read_events(chunks, line_bytes=1 << 20, response_bytes=1 << 25, lenient=True))
    assert len(events) < 2 * len(chunks)
    assert [found.data for found in events if found.data][-1] == "[DONE]" and len(
        [found for found in events if found.data]
    ) == 2


@pytest.mark.parametrize(
    "idle",
    [b"data: {}\n\n", b"event: ping\ndata: 1\n\n", b'data: {"choices": []}\n\n', b"data: {}\n", b"{}\n"],
)
def test_events_that_say_nothing_are_bounded(idle: bytes) -> None:
    """A flood of events without text ends as an error, long before the bound of bytes."""
    with pytest.raises(CloudProtocolError, match="say nothing"):
        _ask(replies(HEAD + idle * 4000), replace(PATIENT, idle_events=1000))


@pytest.mark.parametrize(
    "code", [429, "429", 502, 503, "rate_limit_exceeded", "overloaded_error", "SERVER_ERROR"]
)
def test_a_passing_failure_inside_success_is_tried_again(code) -> None:
    """A gateway's 200 with the status of the server behind it in the body is treated like that status."""
    failure = status(200, body=json.dumps({"error": {"message": "no", "code": code}}).encode())
    streamed = HEAD + b"data: " + json.dumps({"error": {"message": "no", "code": code}}).encode() + b"\n\n"
    good = HEAD + event("Hello", "stop") + DONE
    for first in (failure, streamed):
        acts = [replies(first), replies(good)]
        with misbehaving(lambda number, acts=acts: acts[min(number, 1)], by_number=True) as server:
            client = OpenAIModel(CloudOptions(server.url, "m", limits=PATIENT))
            assert client.submit(REQUEST).result().text == "Hello" and server.accepted == 2
            client.close()
        with pytest.raises(CloudUnavailableError):
            _ask(replies(first))


@pytest.mark.parametrize(
    "code", [400, 401, "insufficient_quota", "invalid_request_error", "model_not_found", 7]
)
def test_a_lasting_failure_inside_success_is_not(code) -> None:
    """What another attempt would meet again is not asked again; nor is a failure after text."""
    body = json.dumps({"error": {"message": "no", "code": code}}).encode()
    with misbehaving(replies(status(200, body=body))) as server:
        client = OpenAIModel(CloudOptions(server.url, "m", limits=PATIENT))
        with pytest.raises(CloudProtocolError):
            client.submit(REQUEST).result()
        assert server.accepted == 1
        client.close()
    late = event("Hel") + b'data: {"error": {"message": "no", "code": 503}}\n\n'
    with misbehaving(replies(HEAD + late)) as server:
        client = OpenAIModel(CloudOptions(server.url, "m", limits=DRIPPED))
        with pytest.raises(CloudProtocolError):
            client.submit(REQUEST).result()
        assert server.accepted == 1
        client.close()
