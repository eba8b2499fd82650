"""What an endpoint says when it refuses or fails, in the shapes that real ones use."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from edge_reasoner.errors import one_line

#: of what an endpoint says, this much is shown
_MAX_SHOWN_CHARS = 200
_MAX_DEPTH = 6
_MAX_DIGITS = 40
#: where the text of a fault stands, the most telling first
_TEXT_KEYS = (
    *("message", "detail", "msg", "error_description", "error_msg", "errors", "title", "reason"),
    *("details", "issues", "violations", "fieldViolations", "description", "cause"),
)
#: where the name of a field that is refused stands, or an object around it
_PARAMETER_KEYS = ("param", "parameter", "field", "property", "additionalProperty", "pointer", "instancePath")
_PARAMETER_LISTS = ("loc", "path", "keys")
_CODE_KEYS = ("code", "type", "status", "status_code", "statusCode", "http_status")


@dataclass(frozen=True)
class Fault:
    """`parameters`: the request's fields that it names itself, in order; `codes` in lower case."""

    message: str
    parameters: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """ ": MESSAGE" in one line of bounded length, or nothing."""
        codes = fix_surrogates(", ".join(self.codes))
        text = one_line(self.message, _MAX_SHOWN_CHARS) or one_line(codes, _MAX_SHOWN_CHARS)
        return f": {text}" if text else ""


def parse_json(data: bytes | str) -> Any:
    """JSON as endpoints write it: UTF-8 with flaws replaced, NaN allowed. Raises ValueError only."""
    text = data.decode("utf-8", "replace") if isinstance(data, bytes) else data
    try:
        return json.loads(text.removeprefix("\ufeff"), parse_int=_integer)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _integer(digits: str) -> float:
    # Python refuses to read thousands of digits; nothing that is needed here has as many
    return int(digits) if len(digits) <= _MAX_DIGITS else float("-inf" if digits.startswith("-") else "inf")


def parse_fault(body: bytes) -> Fault:
    """The fault in the body of a refusal: JSON of any known shape, or plain text. Never raises."""
    try:
        value = parse_json(body)
    except ValueError:
        text = body.decode("utf-8", "replace").strip()
        # a page of HTML says nothing in one line
        return Fault("" if text.startswith("<") else text)
    return fault_of(value)


def fault_of(value: Any) -> Fault:
    """The fault in a JSON value."""
    found = list(_walk(value, 0))
    texts = [text for kind, text in found if kind == "text"]
    parameters = dict.fromkeys(text for kind, text in found if kind == "parameter")
    codes = dict.fromkeys(text.lower() for kind, text in found if kind == "code")
    message = fix_surrogates("; ".join(dict.fromkeys(texts)))
    return Fault(message, tuple(parameters), tuple(codes))


_SURROGATE = re.compile("[\ud800-\udfff]")


def fix_surrogates(text: str) -> str:
    """`text` with pairs of surrogates joined and lone ones replaced: it can be written as UTF-8."""
    if not _SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _walk(value: Any, depth: int) -> Iterator[tuple[str, str]]:
    """(kind, text) of what a fault says: kind is text, parameter or code."""
    if depth > _MAX_DEPTH:
        return
    if isinstance(value, str):
        yield from _text(value, depth)
    elif isinstance(value, list):
        for item in value[:8]:
            yield from _walk(item, depth + 1)
    elif isinstance(value, dict):
        yield from _named(value)
        if value.get("error"):
            yield from _walk(value["error"], depth + 1)
        for key in _TEXT_KEYS:
            if value.get(key):
                yield from _walk(value[key], depth + 1)
        for key, said in value.items():
            # {"top_k": ["is not allowed"]}
            if key not in (*_TEXT_KEYS, *_PARAMETER_LISTS) and _is_texts(said):
                yield "parameter", key
                yield from _walk(said, depth + 1)
        # gateways put what the provider behind them said here
        metadata = value.get("metadata")
        if isinstance(metadata, dict) and metadata.get("raw"):
            yield from _walk(metadata["raw"], depth + 1)


def _text(text: str, depth: int) -> Iterator[tuple[str, str]]:
    # gateways hand on the JSON of the server behind them as a string, often after some words
    start = text.find("{")
    if start >= 0:
        try:
            inner = parse_json(text[start:].rstrip(" '\"\n"))
        except ValueError:
            pass
        else:
            found = list(_walk(inner, depth + 1))
            yield from found
            if any(kind == "text" for kind, _ in found):
                return
    if text.strip():
        yield "text", text


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in value[:8])


def _named(value: dict[str, Any]) -> Iterator[tuple[str, str]]:
    named = [value, *(value[key] for key in ("params", "source") if isinstance(value.get(key), dict))]
    for parameter in (item.get(key) for item in named for key in _PARAMETER_KEYS):
        if isinstance(parameter, str) and parameter:
            yield "parameter", parameter
    for location in (value.get(key) for key in _PARAMETER_LISTS):
        if isinstance(location, list):
            for part in location[:16]:
                if isinstance(part, str) and part not in ("body", "query"):
                    yield "parameter", part
    for key in _CODE_KEYS:
        code = value.get(key)
        if isinstance(code, str) and len(code) < 100:
            yield "code", code
        elif isinstance(code, int) and 100 <= code < 600:
            # HTTP's
            yield "code", str(code)
