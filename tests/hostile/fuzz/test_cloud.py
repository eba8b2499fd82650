"""Fuzzers of what a cloud endpoint may send: event streams, JSON replies, model lists, error bodies, packed
bodies."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable

import pytest
from hostile.fuzz.mutate import FEW, MANY, check

from edge_reasoner.cloud.answer import AnswerUnderWay
from edge_reasoner.cloud.base import CloudLimits
from edge_reasoner.cloud.dialect import Dialect
from edge_reasoner.cloud.encodings import unpacked
from edge_reasoner.cloud.faults import parse_fault
from edge_reasoner.cloud.model_list import first_chat_model
from edge_reasoner.cloud.redact import Redactor
from edge_reasoner.cloud.replies import read_answer

KEY = "sk-proj-0123456789abcdefghij"
LIMITS = CloudLimits(line_bytes=200_000, response_bytes=1_000_000, answer_chars=100_000)
SENT = {
    "model": "m",
    "messages": [],
    "stream": True,
    "temperature": 0.0,
    "max_tokens": 9,
    "top_p": 1.0,
    "seed": 3,
}


def fuzz_cloud_reply(data: bytes) -> None:
    """Reads a body as the client does: what comes out is text that can be written, and not the key."""
    answer = AnswerUnderWay(Redactor((KEY,)), LIMITS, lambda: 0.0)
    answer.begin(SENT, stop=("\n\nUser:",))
    chunks = (data[at : at + 997] for at in range(0, len(data), 997))
    text = "".join(read_answer(chunks, answer, LIMITS))
    result = answer.result("m")
    assert text.strip() and len(text) <= LIMITS.answer_chars
    for shown in (text, result.thinking or "", result.model, result.finish_reason):
        shown.encode("utf-8")
        assert KEY[:8] not in shown and KEY[-8:] not in shown
    assert result.usage is None or min(result.usage.prompt_tokens, result.usage.completion_tokens) >= 0


def fuzz_cloud_models(data: bytes) -> None:
    """Chooses a model as the client does."""
    chosen = first_chat_model(data)
    assert chosen.id.strip() and chosen.id.encode("utf-8")
    assert chosen.context_tokens is None or chosen.context_tokens > 0


def fuzz_cloud_fault(data: bytes) -> None:
    """Reads a refusal as the client does: one line, and at most changes of what was sent."""
    fault = parse_fault(data)
    assert "\n" not in fault.shown and len(fault.shown) <= 202 and fault.shown.encode("utf-8") is not None
    changes = Dialect().repair(400, fault, SENT, ())
    assert changes is None or set(changes) <= set(SENT) - {"model", "messages"}


def fuzz_cloud_gzip(data: bytes) -> None:
    """Unpacks a body as the client does."""
    chunks = (data[at : at + 97] for at in range(0, len(data), 97))
    assert sum(map(len, unpacked(chunks, "gzip", 100_000))) <= 100_000


def _stream(*values: object) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(value).encode() for value in values) + b"data: [DONE]\n\n"


def _chunk(delta: object, finish: object = None, **more: object) -> dict:
    return {
        "id": "c",
        "model": "m",
        "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        **more,
    }


USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 1}}
STREAM = _stream(
    _chunk({"role": "assistant", "reasoning_content": "thought"}),
    _chunk(
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "so"}]},
                {"type": "text", "text": "A"},
            ]
        }
    ),
    _chunk({"content": f"nswer {KEY} 😀"}),
    _chunk({"content": None}, "stop"),
    {"choices": [], "usage": USAGE},
)
WHOLE = {
    "model": "m",
    "choices": [{"index": 0, "message": {"content": "Hi", "refusal": None}, "finish_reason": "stop"}],
}
REPLIES = [
    STREAM,
    b"\xef\xbb\xbf: hi\r\nevent: ping\r\ndata\r\n\r\nid: 1\rretry: 5\r" + STREAM.replace(b"\n", b"\r"),
    json.dumps({**WHOLE, "usage": USAGE}).encode(),
]
MODELS = [
    json.dumps(value).encode()
    for value in (
        {"object": "list", "data": [{"id": "text-embedding-3"}, {"id": "a", "max_model_len": 4096}]},
        {"models": [{"name": "b", "type": "llm", "details": {"n": 1}}]},
        {"c": {"object": "model"}, "d": {}},
        ["e"],
    )
]
FAULTS = [
    json.dumps(value).encode()
    for value in (
        {
            "error": {
                "message": "Unsupported parameter: 'max_tokens'.",
                "param": "max_tokens",
                "code": "unsupported",
            }
        },
        {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs", "type": "extra_forbidden"}]},
        {"error": {"message": "failed", "metadata": {"raw": '{"error": {"message": "no temperature"}}'}}},
        [{"error": 'upstream: {"message": "top_p?"}'}],
    )
]
FORMATS: dict[str, tuple[Callable[[bytes], None], list[bytes]]] = {
    "reply": (fuzz_cloud_reply, REPLIES),
    "models": (fuzz_cloud_models, MODELS),
    "fault": (fuzz_cloud_fault, FAULTS),
    "gzip": (fuzz_cloud_gzip, [gzip.compress(STREAM, mtime=0), zlib.compress(STREAM)]),
}
WORDS = (
    b"data:",
    b"\n\n",
    b"[DONE]",
    b"error",
    b'"choices"',
    b'"delta"',
    b'"content"',
    KEY.encode(),
    b"\\ud83d",
    b"max_tokens",
)


@pytest.mark.parametrize("name", FORMATS)
def test_few_mutations(name: str) -> None:
    """Whatever is damaged, the outcome is an answer or an error of the project, within time and memory."""
    target, seeds = FORMATS[name]
    check(target, seeds, FEW, words=WORDS)


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_many_mutations(name: str) -> None:
    """The same over many more mutations."""
    target, seeds = FORMATS[name]
    check(target, seeds, MANY, seed=1, words=WORDS)
