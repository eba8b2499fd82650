"""What the owner lets out: a screen reads a request as it would be sent, and refuses or lets it pass."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NewType

from edge_reasoner.errors import InputError, PrivacyVetoError, one_line, shown
from edge_reasoner.privacy.fold import views
from edge_reasoner.privacy.kinds import KINDS

#: A request's bytes that a screen has read and let pass; nothing else is sent.
ScreenedBody = NewType("ScreenedBody", bytes)

#: every kind that is looked for unless the owner says otherwise
PRIVATE_KINDS: tuple[str, ...] = tuple(KINDS)
DEFAULT_MAX_CHARS = 400_000
#: characters of a request beside its messages: names of parameters, the model, stop strings
_MAX_OTHER_CHARS = 65_536
#: no pattern reads across this: what stands in two places is not one text
_BORDER = "\n\x00\n"


@dataclass(frozen=True)
class Screen:
    """The owner's rules for what leaves the device. Illegal values are refused at construction (InputError).

    kinds: names out of `PRIVATE_KINDS`.
    patterns: name → regular expression, looked for in the text as it is and in its folded form.
    max_chars: longest text of a request's messages; a longer one is refused before any pattern reads it.
    local_only: nothing is let out at all.
    """

    kinds: tuple[str, ...] = PRIVATE_KINDS
    patterns: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    max_chars: int = DEFAULT_MAX_CHARS
    local_only: bool = False
    _compiled: tuple[tuple[str, re.Pattern[str]], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if not isinstance(kind, str) or kind not in KINDS:
                known = ", ".join(KINDS)
                raise InputError(f"policy: private_kinds: {shown(kind)} is not known; there are {known}")
        compiled = []
        for name, pattern in self.patterns.items():
            try:
                compiled.append((name, re.compile(pattern)))
            except (re.error, TypeError, OverflowError, RecursionError) as error:
                raise InputError(f"policy: private pattern {shown(name)}: {one_line(error)}") from error
        object.__setattr__(self, "_compiled", tuple(compiled))

    def reasons(self, request: Mapping[str, Any]) -> tuple[str, ...]:
        """Why a request must not be sent, without a word of what it holds; empty: it may.

        `request`: any values of JSON, as an endpoint would get them; every key and value is read, each under
        its key. Length comes first: what is too long is not read.
        """
        if self.local_only:
            return ("the policy is local_only",)
        if _chars(request.get("messages")) > self.max_chars:
            return (f"the prompt exceeds the {self.max_chars} characters that may be sent",)
        texts = list(_texts(request))
        if sum(map(len, texts)) > self.max_chars + _MAX_OTHER_CHARS:
            return (f"the request exceeds the {self.max_chars} characters that may be sent",)
        return tuple(f"private: the prompt holds a {name}" for name in self.matches(*texts))

    def matches(self, *texts: str) -> tuple[str, ...]:
        """Names of the kinds and patterns that are found in any of the texts."""
        raw = _BORDER.join(texts)
        read = tuple(
            _BORDER.join(parts) for parts in zip(*(_two(views(text)) for text in texts), strict=True)
        )
        read = read[:1] if len(read) == 2 and read[0] == read[1] else read
        found = [name for name in self.kinds if any(KINDS[name](text) for text in read)]
        return (
            *found,
            *(name for name, own in self._compiled if any(map(own.search, dict.fromkeys((raw, *read))))),
        )

    def checked(self, body: bytes) -> ScreenedBody:
        """A JSON request as it goes on the wire, let pass. Raises PrivacyVetoError."""
        if len(body) > 12 * (self.max_chars + _MAX_OTHER_CHARS):
            raise PrivacyVetoError(f"the request exceeds the {self.max_chars} characters that may be sent")
        if why := self.reasons(_parsed(body)):
            raise PrivacyVetoError("; ".join(why))
        return ScreenedBody(body)


#: the rules where the owner gives no others
DEFAULT_SCREEN = Screen()


def _parsed(body: bytes) -> Mapping[str, Any]:
    """A request's JSON. Raises InputError where a name comes twice: one of them would not be read."""
    parsed = json.loads(body, object_pairs_hook=_once, parse_float=_plain_number)
    if not isinstance(parsed, dict):
        raise InputError("request: an object is needed")
    return parsed


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise InputError("request: two fields of one name")
    return made


def _plain_number(text: str) -> str:
    # 4111111111111111.0 is a card's number too
    return text.removesuffix(".0")


def _two(found: tuple[str, ...]) -> tuple[str, str]:
    return found[0], found[-1]


def _chars(messages: Any) -> int:
    """Characters of all texts in messages, roles aside."""
    return sum(len(text) for key, text in _leaves(messages) if key != "role")


def _texts(request: Mapping[str, Any]) -> Iterator[str]:
    for key, text in _leaves(request):
        yield f"{key}: {text}" if key else text


def _leaves(value: Any) -> Iterator[tuple[str, str]]:
    """(key that it stands under, text) of everything in a JSON value; a key with nothing under it too."""
    waiting: list[tuple[str, Any]] = [("", value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, Mapping):
            waiting += [(str(name), part) for name, part in value.items()]
            if key or not value:
                yield "", key
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += [(key, part) for part in value]
            if not value:
                yield "", key
        elif value is not None and not isinstance(value, bool):
            yield key, value if isinstance(value, str) else _plain_number(str(value))
        else:
            yield "", key
