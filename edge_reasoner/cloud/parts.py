"""Chat-completions replies, streamed and whole, in the shapes that real endpoints send.

What carries the answer is read strictly: a reply that cannot be one is an error. Side fields (usage, model,
finish reason) in odd shapes count as unknown; they never cost an answer that arrived.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from edge_reasoner.chat.model import Usage
from edge_reasoner.cloud.faults import Fault, fault_of, parse_json
from edge_reasoner.errors import CloudProtocolError

_MAX_TOKENS = 2**40
_MAX_NAME_CHARS = 200
_TEXT_PARTS = frozenset(("text", "output_text", "input_text", "text_delta", "output_text_delta", None))
_THINKING_PARTS = frozenset(
    (
        *("thinking", "thinking_delta", "redacted_thinking", "thought", "reasoning", "reasoning_delta"),
        *("reasoning_content", "reasoning_text", "reasoning.text", "reasoning.summary", "summary_text"),
    )
)
#: where an answer's thinking stands beside it
_THINKING_KEYS = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
_REASONS = {
    "eos": "stop",
    "eos_token": "stop",
    "end_turn": "stop",
    "stop_sequence": "stop",
    "completed": "stop",
    "max_tokens": "length",
    "model_length": "length",
}
#: in what servers write when they gave up in mid-answer
_FAILED = re.compile(
    r"error|fail|abort|cancel|time_?d?_?out|overload|interrupt|unavailable|exhaust|disconnect|crash"
    r"|exception|insufficient|preempt|killed|rate_?limit"
)
_FINE_WORDS = frozenset(("", "null", "none", "ok", "success"))
#: gateways put the reply of the server behind them in here
_WRAPPERS = ("data", "result", "response")


class EndpointFailedError(Exception):
    """The endpoint reports a failure inside a reply that looked like success."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


@dataclass(frozen=True)
class Part:
    """What one chunk, or a whole reply, says. None: nothing."""

    text: str = ""
    thinking: str = ""
    finish_reason: str | None = None
    model: str | None = None
    usage: Usage | None = None
    called_tools: bool = False
    refused: bool = False
    #: the chunk is no part of an answer; what it says may explain why none comes
    remark: str = ""
    #: which of several answers it is part of, where the endpoint counts them
    index: float | None = None
    #: not a delta: it may hold again all that came before
    is_message: bool = False


def parse_part(data: bytes | str, index: float | None = None) -> Part:
    """One chunk or a whole reply; of several answers in it, that of `index`, or the first.

    Raises EndpointFailedError; CloudProtocolError for what cannot be part of an answer.
    """
    try:
        value = parse_json(data)
    except ValueError as error:
        raise CloudProtocolError(f"not JSON: {error}") from error
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not isinstance(value, dict):
        raise CloudProtocolError(f"not a chat completion: {type(value).__name__} instead of an object")
    value = _unwrapped(value)
    vendor = value["x_groq"] if isinstance(value.get("x_groq"), dict) else {}
    if _is_fault(value.get("error")) or "error" in (value.get("object"), value.get("type")):
        raise EndpointFailedError(fault_of(value))
    if _is_fault(vendor.get("error")):
        raise EndpointFailedError(fault_of(vendor))
    choices = value.get("choices") or None
    if choices is not None and not isinstance(choices, list):
        raise CloudProtocolError(f"not a chat completion: choices is {type(choices).__name__}")
    choice = _choice(choices or [], index)
    usage, model = _usage(value.get("usage")) or _usage(vendor.get("usage")), _name(value.get("model"))
    if choice is None:
        return Part(model=model, usage=usage, remark="" if choices or usage else fault_of(value).message)
    status = value.get("status")
    if isinstance(status, str) and _FAILED.search(status.lower()):
        raise EndpointFailedError(Fault(f"status {status!r}"))
    return _answer(choice, model, usage or _usage(choice.get("usage")))


def _answer(choice: dict[str, Any], model: str | None, usage: Usage | None) -> Part:
    if _is_fault(choice.get("error")):
        raise EndpointFailedError(fault_of(choice))
    said = _said(choice)
    if _is_fault(said.get("error")):
        raise EndpointFailedError(fault_of(said))
    reason = _reason(choice.get("finish_reason") or said.get("finish_reason"))
    if reason is None and "finish_reason" not in choice:
        reason = _reason(choice.get("stop_reason") or choice.get("finishReason"))
    if reason is not None and _FAILED.search(reason.lower()):
        raise EndpointFailedError(Fault(f"finish reason {reason!r}"))
    text, thinking = _content(said.get("content"))
    for key in _THINKING_KEYS:
        # servers that send two of these send the same twice
        if not thinking and said.get(key) and isinstance(said[key], (str, list, dict)):
            thinking = "".join(_content(said[key]))
    refusal = said.get("refusal")
    # what a model says when it refuses is its answer
    refusal = refusal if isinstance(refusal, str) else ""
    return Part(
        text + refusal,
        thinking,
        reason,
        model,
        usage,
        called_tools=bool(said.get("tool_calls") or said.get("function_call")),
        refused=bool(refusal),
        index=_index(choice),
        is_message=bool(not choice.get("delta") and choice.get("message")),
    )


def _said(choice: dict[str, Any]) -> dict[str, Any]:
    """What a choice says: a delta, a whole message or a text."""
    # an empty list is what some languages write for an empty object
    said = choice.get("delta") or None
    if said is None:
        said = choice.get("message") or None
    if said is None:
        return {"content": choice.get("text")}
    if isinstance(said, str):
        return {"content": said}
    if not isinstance(said, dict):
        raise CloudProtocolError(f"not a chat completion: a delta of type {type(said).__name__}")
    return said


def _unwrapped(value: dict[str, Any]) -> dict[str, Any]:
    if "choices" not in value:
        for key in _WRAPPERS:
            inner = value.get(key)
            if isinstance(inner, dict) and isinstance(inner.get("choices"), list):
                return {**value, **inner}
    return value


def _is_fault(value: Any) -> bool:
    if isinstance(value, dict):
        code, text = value.get("code"), value.get("message")
        if code in (0, "0", None) and isinstance(text, str) and text.strip().lower() in _FINE_WORDS:
            return any(item for key, item in value.items() if key not in ("code", "message"))
        return any(value.values())
    return value.strip().lower() not in _FINE_WORDS if isinstance(value, str) else bool(value)


def _choice(choices: list[Any], wanted: float | None) -> dict[str, Any] | None:
    """The answer asked for, where an endpoint sends several: the one that is followed already, or the first
    of them, whatever it counts from."""
    found: dict[str, Any] | None = None
    for choice in choices:
        if choice is None:
            continue
        if not isinstance(choice, dict):
            raise CloudProtocolError(f"not a chat completion: a choice of type {type(choice).__name__}")
        if wanted is not None and _index(choice) == wanted:
            return choice
        if found is None or (_index(choice) or 0) < (_index(found) or 0):
            found = choice
    return found


def _index(choice: dict[str, Any]) -> float | None:
    index = choice.get("index")
    return index if isinstance(index, (int, float)) and not isinstance(index, bool) else None


def _content(value: Any) -> tuple[str, str]:
    """(text, thinking) of a content: a string, or parts of several types."""
    if value is None or isinstance(value, str):
        return value or "", ""
    parts = value if isinstance(value, list) else [value]
    text = thinking = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        if isinstance(value, list) and not part:
            continue
        if not isinstance(part, dict) or not part:
            raise CloudProtocolError(f"not a chat completion: content of type {type(value).__name__}")
        kind = part.get("type")
        kind = kind if isinstance(kind, str) else None
        if kind in _THINKING_PARTS or part.get("thought") is True:
            thinking += _thought(part)
        elif kind in _TEXT_PARTS or kind == "refusal":
            inner = part.get("refusal") if kind == "refusal" else part.get("text", part.get("content"))
            if isinstance(inner, dict):
                inner = inner.get("value")
            text += inner if isinstance(inner, str) else ""
    return text, thinking


def _thought(part: dict[str, Any]) -> str:
    for key in ("thinking", "reasoning", "text", "summary", "content"):
        value = part.get(key)
        if isinstance(value, str):
            return value
        if isinstance(value, list):
            return "".join(item["text"] for item in value if _has_text(item))
    return ""


def _has_text(item: Any) -> bool:
    return isinstance(item, dict) and isinstance(item.get("text"), str)


def _reason(value: Any) -> str | None:
    """A finish reason; None while the answer goes on. A reason in an odd shape is "unknown"."""
    if isinstance(value, dict):
        value = next((word for key in ("type", "reason", "name") if (word := value.get(key))), "unknown")
    if not value or (isinstance(value, str) and value.strip().lower() in ("", "null", "none")):
        return None
    if not isinstance(value, str):
        return "unknown"
    word = value.strip()[:_MAX_NAME_CHARS]
    return _REASONS.get(word.lower(), word.lower() if word.isupper() else word)


def _name(value: Any) -> str | None:
    return value[:_MAX_NAME_CHARS] if isinstance(value, str) and value.strip() else None


def _usage(value: Any) -> Usage | None:
    """Counts, if both are there and are counts."""
    if not isinstance(value, dict):
        return None
    prompt = _count(value.get("prompt_tokens", value.get("input_tokens")))
    completion = _count(value.get("completion_tokens", value.get("output_tokens")))
    if prompt is None or completion is None:
        return None
    details = value.get("prompt_tokens_details")
    cached = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
    return Usage(prompt, completion, min(cached or 0, prompt))


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not 0 <= value <= _MAX_TOKENS or value != int(value):
        return None
    return int(value)
