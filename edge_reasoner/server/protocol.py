"""Requests and replies of the OpenAI protocol. Requests are untrusted: parsed strictly, bounded, answered
with the protocol's own error bodies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from edge_reasoner.chat.messages import THINKING_FIELDS
from edge_reasoner.chat.model import ChatResult, Usage
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.engine.generate import TokenPiece
from edge_reasoner.errors import InputError

MAX_REQUEST_BYTES = 4 * 1024 * 1024
DEFAULT_MAX_TOKENS = 512
_MAX_MESSAGES = 2000
_RETRY_AFTER_S = 2
_THINKING = THINKING_FIELDS[0]

Body = TypeVar("Body", bound="_Body")
_Zero = Annotated[float, Meta(ge=0, le=0)]
_Role = Literal["system", "developer", "user", "assistant", "tool"]


class RequestError(Exception):
    """A request that gets an error reply: HTTP status, type and message as the protocol has them."""

    def __init__(
        self, status: int, message: str, kind: str = "invalid_request_error", retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON error body."""
        return {"error": {"message": str(self), "type": self.kind, "param": None, "code": self.status}}


def too_busy(why: str) -> RequestError:
    """The reply to a request that would have to wait too long."""
    return RequestError(429, why, "rate_limit_error", _RETRY_AFTER_S)


def ending() -> RequestError:
    """The reply to a request that the end of the service cuts short, or that comes after it."""
    return RequestError(503, "the service ends", "server_error")


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One part of a message's content; only text is served."""

    type: Literal["text"]
    text: str


class RequestMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message. What was thought before an earlier answer is for templates that ask for it."""

    role: _Role
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class StreamOptions(msgspec.Struct, frozen=True):
    """`include_usage`: a last chunk with the token counts."""

    include_usage: bool = False


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Fields that both endpoints share. Those below the line are accepted and have no effect here."""

    model: Annotated[str, Meta(max_length=400)]
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    #: most tokens, prompt and answer together, that the model attends to
    attention_window: Annotated[int, Meta(ge=1)] | None = None
    n: Literal[1] | None = None
    # ----
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    presence_penalty: _Zero | None = None
    frequency_penalty: _Zero | None = None

    def params(self, max_tokens: int | None) -> SamplingParams:
        """The sampling parameters. Raises RequestError(400)."""
        stop = [self.stop] if isinstance(self.stop, str) else (self.stop or [])
        given: dict[str, Any] = {
            # the protocol's default is 1
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "max_tokens": DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens,
            "seed": self.seed,
            "stop": tuple(stop),
        }
        try:
            return SamplingParams(**{name: value for name, value in given.items() if value is not None})
        except InputError as error:
            raise RequestError(400, str(error)) from error


class ChatBody(_Body, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[RequestMessage], Meta(min_length=1, max_length=_MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None

    def chat(self) -> list[dict[str, Any]]:
        """The messages, each content one string."""
        messages = []
        for message in self.messages:
            content = message.content
            if content is None:
                raise RequestError(400, f"message of role {message.role!r}: content is missing")
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            # the chat templates of small models know no developer role
            plain = {"role": message.role.replace("developer", "system"), "content": text}
            if thinking := message.reasoning_content or message.reasoning:
                plain[_THINKING] = thinking
            messages.append(plain)
        return messages


class CompletionBody(_Body, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`POST /v1/completions`: continues one text."""

    prompt: str
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None
    logprobs: None = None


def parse_body(data: bytes, kind: type[Body]) -> Body:
    """Parses a request body strictly; a field that is null is as if it were not there, whatever its name.

    Raises RequestError(400) naming the field.
    """
    try:
        return msgspec.convert(_without_nulls(msgspec.json.decode(data)), kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(400, f"request: {error}") from error


def _without_nulls(value: Any) -> Any:
    """Clients send null for what they do not set (`"tools": null`); items of a list are another matter."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Reply:
    """What identifies one reply in all of its parts."""

    id: str
    created_s: int
    model: str
    chat: bool

    def chunk(
        self,
        text: str | None,
        finish_reason: str | None = None,
        tokens: list[str] | None = None,
        thought: str = "",
    ) -> dict[str, Any]:
        """One streamed event. Thinking has a field of its own, as DeepSeek, llama.cpp and vLLM have it."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        if self.chat:
            choice["delta"] = {} if text is None else {"content": text}
            if thought:
                choice["delta"] = {_THINKING: thought} | ({"content": text} if text else {})
            choice["logprobs"] = None if tokens is None else _logprobs(tokens)
        else:
            choice["text"] = text or ""
        return {**self._head(streamed=True), "choices": [choice]}

    def first_chunk(self) -> dict[str, Any]:
        """The event that opens a chat stream with the role."""
        chunk = self.chunk("")
        chunk["choices"][0]["delta"]["role"] = "assistant"
        return chunk

    def usage_chunk(self, usage: Usage | None) -> dict[str, Any]:
        """The last event, where it was asked for."""
        return {**self._head(streamed=True), "choices": [], "usage": usage_body(usage)}

    def whole(self, done: ChatResult, tokens: list[str] | None) -> dict[str, Any]:
        """The reply of a request that does not stream."""
        text, usage, finish_reason = done.text, done.usage, finish_reason_body(done.finish_reason)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish_reason}
        if self.chat:
            thinking = {_THINKING: done.thinking} if done.thinking else {}
            choice["message"] = {"role": "assistant", "content": text, "refusal": None, **thinking}
            choice["logprobs"] = None if tokens is None else _logprobs(tokens)
        else:
            choice |= {"text": text, "logprobs": None}
        return {**self._head(streamed=False), "choices": [choice], "usage": usage_body(usage)}

    def _head(self, *, streamed: bool) -> dict[str, Any]:
        kind = "text_completion" if not self.chat else f"chat.completion{'.chunk' if streamed else ''}"
        return {"id": self.id, "object": kind, "created": self.created_s, "model": self.model}


def usage_body(usage: Usage | None) -> dict[str, Any] | None:
    """Token counts as the protocol has them; None where nobody counted."""
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def finish_reason_body(reason: str) -> str:
    """The protocol knows "stop" and "length"; a full context is a length."""
    return "length" if reason in ("length", "context") else "stop"


def _logprobs(pieces: list[str]) -> dict[str, Any]:
    """Of pieces that are tokens of the answer: another tier's pieces are text only."""
    content = [
        {
            "token": str(piece),
            "logprob": piece.logprob,
            "bytes": list(piece.encode("utf-8")),
            "top_logprobs": [],
        }
        for piece in pieces
        if isinstance(piece, TokenPiece) and piece.token_id is not None and not piece.thinking
    ]
    return {"content": content, "refusal": None}
