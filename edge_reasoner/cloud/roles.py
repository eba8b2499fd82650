"""Roles that an endpoint does not take: a system message gets another one, or goes into the user's."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

_ROLES = ("system", "developer")
_REFUSED = re.compile(
    r"(?:system|developer)\W{0,3} (?:role|message|prompt|instruction)s? (?:\w+ ){0,2}"
    r"(?:not (?:supported|enabled|allowed|permitted)|unsupported|invalid)"
    r"|(?:does(?: not|n't)|not) (?:support|allow|accept) (?:a |the )?\W?(?:system|developer)\W"
    r"|\W(?:system|developer)\W (?:role )?is (?:not|un)|roles? must alternate|after the optional system"
    r"|(?:unknown|unsupported|invalid|unexpected) (?:message )?role\W{1,4}(?:system|developer)",
    re.IGNORECASE,
)
_USE_DEVELOPER = re.compile(r"(?:use|expected|supported)\W[^.]{0,40}\bdeveloper", re.IGNORECASE)


class RoleDialect:
    """How one endpoint wants system messages. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: the role that they get; "user": they are put before the user's next message
        self._role: str | None = None

    def apply(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """The messages as this endpoint takes them; those given are not changed."""
        with self._lock:
            role = self._role
        if role is None:
            return list(messages)
        if role != "user":
            return [
                {**message, "role": role} if message.get("role") in _ROLES else message
                for message in messages
            ]
        return _merged(messages)

    def repair(self, said: str, sent: Sequence[Any]) -> bool:
        """Whether this refusal is about a system message's role in `sent`; the next way is taken then."""
        roles = {message.get("role") for message in sent if isinstance(message, Mapping)}
        if not roles.intersection(_ROLES) or not _REFUSED.search(said):
            return False
        with self._lock:
            named = "developer" if "system" in roles and _USE_DEVELOPER.search(said) else "user"
            self._role = "user" if self._role == "developer" else named
        return True


def _merged(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with each system message put before the text of the user's next one."""
    made: list[Mapping[str, Any]] = []
    held: list[Any] = []
    for message in messages:
        if message.get("role") in _ROLES:
            held.append(message.get("content"))
        elif held and message.get("role") == "user":
            made.append({**message, "content": _joined([*held, message.get("content")])})
            held = []
        else:
            made.append(message)
    if held:
        made.append({"role": "user", "content": _joined(held)})
    return made


def _joined(contents: list[Any]) -> Any:
    if all(isinstance(content, str) for content in contents):
        return "\n\n".join(contents)
    parts: list[Any] = []
    for content in contents:
        if isinstance(content, list):
            parts += content
        elif content is not None:
            parts.append({"type": "text", "text": str(content)})
    return parts
