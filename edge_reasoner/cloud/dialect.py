"""The request as one endpoint takes it: parameters that it refuses are renamed or dropped, and that is
remembered."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping
from typing import Any

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.cloud.faults import Fault
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
_WORDS = frozenset(("stop", "stream", "seed", "temperature"))
_AS_PARAMETER = r"(?:['\"`]|(?:parameter|argument|field|name|option|key|supplied|support|supported)s?:? )"
_REFUSED_STATUS = frozenset((400, 422))

Change = tuple[str, str | None]


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
        self, status: int, fault: Fault, sent: Mapping[str, Any], own: frozenset[str]
    ) -> Change | None:
        """The change that this refusal of `sent` asks for, or None; it is remembered.

        `own`: names of fields that the caller added; they are never touched.
        """
        if status not in _REFUSED_STATUS:
            return None
        names = [name for name in _OPTIONAL if name in sent and name not in own]
        name = _refused_name(fault, names, sent)
        if name is None:
            return None
        words = " ".join((fault.message, *fault.codes)).lower()
        if name == _OLD_LIMIT and ("instead" in words or not _TOO_LARGE.search(words)):
            change: Change = (name, _NEW_LIMIT)
        else:
            change = (name, None)
        self._remember(change, sent[name], about_value=bool(_VALUE_WORDS.search(words)))
        return change

    def _remember(self, change: Change, value: Any, *, about_value: bool) -> None:
        name, new_name = change
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
        "messages": [dict(message) for message in request.messages],
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


def encode(body: Mapping[str, Any]) -> bytes:
    """The body as JSON. Raises InputError for messages or fields that are none."""
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"messages: cannot be written as JSON: {error}") from error


def _refused_name(fault: Fault, names: list[str], sent: Mapping[str, Any]) -> str | None:
    for said in fault.parameters:
        # "body.temperature", "stream_options.include_usage"
        for word in re.split(r"[.\[\]/]", said):
            if word in names:
                return word
    if any(said.split(".")[0].split("[")[0] in ("messages", "model") for said in fault.parameters):
        return None
    found = []
    for name in names:
        before = _AS_PARAMETER if name in _WORDS else r"(?<![\w-])"
        match = re.search(rf"{before}{name}(?![\w-])", fault.message)
        if match:
            found.append((sent[name] != _NEUTRAL.get(name), match.start(), name))
    # of several, one that says nothing anyway; else the first that is named
    return min(found)[2] if found else None
