"""What the owner of the device allows, whatever the gate thinks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from edge_reasoner.errors import InputError

Mode = Literal["auto", "local", "cloud", "offline"]
MODES: tuple[Mode, ...] = ("auto", "local", "cloud", "offline")

#: name → regular expression: a prompt that matches one never leaves the device
PRIVATE_PATTERNS: Mapping[str, str] = MappingProxyType(
    {
        "e-mail address": r"\b[\w.+-]{1,64}@[\w-]{1,63}(?:\.[\w-]{2,63}){1,4}\b",
        "payment card": r"\b(?:\d[ -]?){12,18}\d\b",
        "IBAN": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b",
        "secret key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----|\b(?:sk|ghp|xox[bp]|AKIA)[-_A-Za-z0-9]{16,}\b",
        "password": r"(?i)\b(?:password|passwort|mot de passe|contraseña|passcode)\s*(?:is|=|:|ist)\s*\S+",
    }
)


@dataclass(frozen=True)
class Policy:
    """Rules and thresholds. Illegal values are refused at construction (InputError).

    local_only: nothing ever leaves the device.
    private_patterns: name → regular expression; a prompt (any message of a chat) that matches stays local.
    threshold: least estimated probability that the local answer is good.
    threshold_before: below it the local model is not even tried (hopeless prompts).
    early_tokens: after so many tokens, still unseen, a stream commits to local or hands over.
    local_languages: languages that the local model is trusted with; others lower the estimate.
    max_cloud_prompt_chars: a longer prompt is never sent (cost).
    """

    local_only: bool = False
    private_patterns: Mapping[str, str] = field(default_factory=lambda: PRIVATE_PATTERNS)
    threshold: float = 0.5
    threshold_before: float = 0.2
    early_tokens: int = 24
    local_languages: frozenset[str] = frozenset({"en", "und"})
    max_cloud_prompt_chars: int = 400_000
    _compiled: tuple[tuple[str, re.Pattern[str]], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("threshold", "threshold_before"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not 0.0 <= value <= 1.0:
                raise InputError(f"policy: {name}: {value!r} is not allowed; give a number from 0 to 1")
        if not isinstance(self.early_tokens, int) or not 1 <= self.early_tokens <= 4096:
            raise InputError(f"policy: early_tokens: {self.early_tokens!r} is not allowed; give 1 to 4096")
        most = self.max_cloud_prompt_chars
        if not isinstance(most, int) or most < 0:
            raise InputError(f"policy: max_cloud_prompt_chars: {most!r} is not allowed; give 0 or more")
        compiled = []
        for name, pattern in self.private_patterns.items():
            try:
                compiled.append((name, re.compile(pattern)))
            except (re.error, TypeError) as error:
                raise InputError(f"policy: private pattern {name!r}: {error}") from error
        object.__setattr__(self, "_compiled", tuple(compiled))

    def private_matches(self, text: str) -> tuple[str, ...]:
        """Names of the private patterns found in `text`."""
        return tuple(name for name, pattern in self._compiled if pattern.search(text))


def check_mode(mode: str) -> Mode:
    """`mode`, if it is one. Raises InputError."""
    for known in MODES:
        if mode == known:
            return known
    raise InputError(f"mode: {mode!r} is not allowed; choose one of {', '.join(MODES)}")
