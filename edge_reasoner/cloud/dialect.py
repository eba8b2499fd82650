"""The request as one endpoint takes it: parameters that it refuses are renamed or dropped, and that is
remembered."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection, Mapping
from typing import Any

from edge_reasoner.chat.messages import THINKING_FIELDS
from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.cloud.faults import Fault
from edge_reasoner.contract.template.render import Message
from edge_reasoner.errors import InputError

#: repairs of one request; there are no more parameters than this
MAX_REPAIRS = 12
_MAX_REMEMBERED_VALUES = 64
_OLD_LIMIT, _NEW_LIMIT = "max_tokens", "max_completion_tokens"
#: what may be left out of a request: without it the answer is another one, but an answer
_OPTIONAL = (
    *("stream_options", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "temperature", "stop"),
    *(_OLD_LIMIT, _NEW_LIMIT, "stream"),
)
_NEUTRAL: Mapping[str, float] = {"top_p": 1.0}
#: words of a refusal that is about a parameter's value, not about the parameter
_VALUE_WORDS = re.compile(
    r"unsupported_value|invalid_value|(?:below|above)_m|less_than|greater_than|unsupported value"
    r"|\bdefault\b|must be|too (?:large|high|small|low|big)|at (?:most|least)|between|range|exceed"
    r"|maximum|minimum|does not support [\d.]",
)
_TOO_LARGE = re.compile(r"too (?:large|high|big)|at most|exceed|less than|maximum (?:context|value|of)|<=")
#: parameters that are everyday words too: meant only where they are quoted or called what they are
_WORDS = frozenset(("stop", "stream", "seed"))
_NAMED = (
    r"(?:['\"`\[(]|(?:parameter|argument|field|name|option|key|supplied|support|supported)s?:? ){0}(?![\w-])"
    r"|(?<![\w-]){0}(?= (?:is |are )?(?:not|parameter|field|argument|un|invalid))"
)
_REFUSED_STATUS = frozenset((400, 422))


class Dialect:
    """What one endpoint has refused so far. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changes: dict[str, str | None] = {}
        self._refused_values: set[tuple[str, str]] = set()

    def apply(self, body: Mapping[str, Any], changes: Mapping[str, str | None]) -> dict[str, Any]:
        """`body` as this endpoint takes it; `changes`: those of this request alone (name → new name, None:
        dropped)."""
        with self._lock:
            known: dict[str, str | None] = {
                name: None for name, value in body.items() if (name, repr(value)) in self._refused_values
            }
            known |= self._changes
        known |= changes
        made: dict[str, Any] = {}
        for name, value in body.items():
            new_name = known.get(name, name)
            if new_name != name and new_name is not None:
                new_name = known.get(new_name, new_name)
            if new_name is not None:
                made[new_name] = value
        if "stream" not in made:
            made.pop("stream_options", None)
        return made

    def repair(
        self, status: int, fault: Fault, sent: Mapping[str, Any], own: Collection[str]
    ) -> dict[str, str | None]:
        """The changes (name → new name, None: dropped) that this refusal of `sent` asks for; they are
        remembered. None of them: it is about something else.

        `own`: names of fields that the caller added; they are never touched.
        """
        if status not in _REFUSED_STATUS:
            return {}
        names = [name for name in _OPTIONAL if name in sent and name not in own]
        words = " ".join((fault.message, *fault.codes)).lower()
        changes: dict[str, str | None] = {}
        for name in _refused_names(fault, names, sent):
            about_value = bool(_VALUE_WORDS.search(words))
            meant = "instead" in words or (_NEW_LIMIT in words and not _TOO_LARGE.search(words))
            changes[name] = _NEW_LIMIT if name == _OLD_LIMIT and (meant or not about_value) else None
            self._remember(name, changes[name], sent[name], about_value=about_value)
        return changes

    def _remember(self, name: str, new_name: str | None, value: Any, *, about_value: bool) -> None:
        with self._lock:
            if new_name is not None or not about_value:
                self._changes[name] = new_name
            elif name not in (_OLD_LIMIT, _NEW_LIMIT) and len(self._refused_values) < _MAX_REMEMBERED_VALUES:
                # a limit is too large for one prompt and right for the next
                self._refused_values.add((name, repr(value)))


def request_body(model: str, request: ChatRequest) -> dict[str, Any]:
    """The request in the protocol's own words."""
    params = request.params
    body: dict[str, Any] = {
        "model": model,
        "messages": [_sent(message) for message in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": params.temperature,
        "top_p": params.top_p,
    }
    # these are no part of the protocol, though many endpoints know them: only where they say something
    for name in ("top_k", "min_p", "repetition_penalty"):
        if getattr(params, name) != getattr(SamplingParams(), name):
            body[name] = getattr(params, name)
    if params.max_tokens is not None:
        body[_OLD_LIMIT] = params.max_tokens
    if params.stop:
        body["stop"] = list(params.stop)
    if params.seed is not None:
        body["seed"] = params.seed
    return body | dict(request.extra)


def _sent(message: Message) -> dict[str, Any]:
    """Without what was thought before earlier answers: some endpoints refuse it."""
    return {name: value for name, value in message.items() if name not in THINKING_FIELDS}


def encode(body: Mapping[str, Any]) -> bytes:
    """The body as JSON. Raises InputError for messages or fields that are none."""
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages: cannot be written as JSON: {error}") from error


def _refused_names(fault: Fault, names: list[str], sent: Mapping[str, Any]) -> list[str]:
    """Those of `names` that a refusal is about: all that it lists as parameters, or one out of its text."""
    # "body.temperature", "stream_options.include_usage"
    listed = [word for said in fault.parameters for word in re.split(r"[.\[\]/]", said)]
    found = [name for name in names if name in listed]
    if found or "messages" in listed or "model" in listed:
        return found
    named = []
    for name in names:
        pattern = _NAMED.format(name) if name in _WORDS else rf"(?<![\w-]){name}(?![\w-])"
        match = re.search(pattern, fault.message)
        if match:
            named.append((sent[name] != _NEUTRAL.get(name), match.start(), name))
    # of several, one that says nothing anyway; else the first that is named
    return [min(named)[2]] if named else []
