"""The request as one endpoint takes it: parameters that it refuses are renamed or dropped, and that is
remembered."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Collection, Mapping
from typing import Any

from edge_reasoner.chat.messages import sent_message
from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.cloud.faults import Fault
from edge_reasoner.cloud.roles import RoleDialect
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
    r"|(?:^|; ){0}(?=: )|: {0}\W*$"
)
#: other words for a parameter
_ALIASES: Mapping[str, str] = {
    "stop": r"stop[_ ]?(?:sequence|word|string|token)s?",
    "stream": r"streaming(?= (?:\w+ )?(?:is |are )?(?:not|un|disabled))|(?<=n't support )streaming"
    r"|(?<=not support )streaming",
    _OLD_LIMIT: r"max[_ ]?(?:new|output)[_ ]?tokens",
}
#: from here on a refusal lists what would be taken
_LISTED = re.compile(
    r"expected one of|did you mean|must be one of|(?<!not )\b(?:supported|allowed|valid|accepted|permitted"
    r"|known) (?:\w+ )?(?:parameter|param|field|argument|name|key|option|propertie)s",
    re.IGNORECASE,
)
_REFUSED_STATUS = frozenset((200, 400, 422))
#: with these a refusal of a parameter has to say that it is one
_OTHER_STATUS = frozenset((403, 404, 405, 406, 409, 415, 500, 501, 502))
_UNKNOWN_WORDS = re.compile(
    r"un(?:supported|recogni[sz]ed|known|expected) (?:key|param|arg|field|name|prop|value|option|input"
    r"|request)|unsupportedparam|not (?:supported|permitted|allowed|enabled)|does(?: not|n't) support"
    r"|extraneous|extra (?:input|field)|unsupported_|is unsupported|not a valid (?:param|arg|field)"
)


class Dialect:
    """What one endpoint has refused so far. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changes: dict[str, str | None] = {}
        self._refused_values: set[tuple[str, str]] = set()
        self._roles = RoleDialect()

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
        if "messages" in made:
            made["messages"] = self._roles.apply(made["messages"])
        return made

    def repair(
        self, status: int, fault: Fault, sent: Mapping[str, Any], own: Collection[str]
    ) -> dict[str, str | None] | None:
        """The changes (name → new name, None: dropped) that this refusal of `sent` asks for; they are
        remembered, as are roles that it refuses. None: it is about something else.

        `own`: names of fields that the caller added; they are never touched.
        """
        said = " ".join((fault.message, *fault.codes)).lower()
        if status not in _REFUSED_STATUS and not (status in _OTHER_STATUS and _UNKNOWN_WORDS.search(said)):
            return None
        if self._roles.repair(fault.message, sent.get("messages", ())):
            return {}
        names = [name for name in _OPTIONAL if name in sent and name not in own]
        changes: dict[str, str | None] = {}
        for name in _refused_names(fault, names, sent):
            about_value = bool(_VALUE_WORDS.search(said))
            meant = "instead" in said or (_NEW_LIMIT in said and not _TOO_LARGE.search(said))
            changes[name] = _NEW_LIMIT if name == _OLD_LIMIT and (meant or not about_value) else None
            self._remember(name, changes[name], sent[name], about_value=about_value)
        return changes or None

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
        "messages": [sent_message(message) for message in request.messages],
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


def _refused_names(fault: Fault, names: list[str], sent: Mapping[str, Any]) -> list[str]:
    """Those of `names` that a refusal is about: all that it lists as parameters, or one out of its text."""
    # "body.temperature", "stream_options.include_usage"
    listed = [word for said in fault.parameters for word in re.split(r"[.\[\]/$]", said)]
    found = [name for name in names if name in listed]
    if found or "messages" in listed or "model" in listed:
        return found
    named = []
    message = _LISTED.split(fault.message, maxsplit=1)[0]
    for name in names:
        # topK is top_k
        spelled = name.replace("_", "_?")
        pattern = _NAMED.format(spelled) if name in _WORDS else rf"(?<![\w-]){spelled}(?![\w-])"
        pattern += rf"|(?<![\w-])(?:{_ALIASES[name]})(?![\w-])" if name in _ALIASES else ""
        match = re.search(pattern, message, re.ASCII | re.IGNORECASE)
        if match:
            named.append((sent[name] != _NEUTRAL.get(name), match.start(), name))
    # of several, one that says nothing anyway; else the first that is named
    return [min(named)[2]] if named else []
