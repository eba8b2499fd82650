"""What the owner of the device allows, whatever the gate thinks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from edge_reasoner.errors import InputError
from edge_reasoner.privacy.screen import DEFAULT_MAX_CHARS, PRIVATE_KINDS, Screen

Mode = Literal["auto", "local", "cloud", "offline"]
MODES: tuple[Mode, ...] = ("auto", "local", "cloud", "offline")


@dataclass(frozen=True)
class Policy:
    """Rules and thresholds. Illegal values are refused at construction (InputError).

    local_only: nothing ever leaves the device.
    private_kinds: kinds of private data (names out of `PRIVATE_KINDS`, all by default) that stay local: a
        request that holds one, in any text of any turn, is not sent.
    private_patterns: name → regular expression; further texts that stay local.
    threshold: least estimated probability that the local answer is good.
    threshold_before: below it the local model is not even tried (hopeless prompts).
    early_tokens: after so many tokens, still unseen, a stream commits to local or hands over.
    local_languages: languages that the local model is trusted with; others lower the estimate.
    max_cloud_prompt_chars: a longer prompt is never sent (cost), nor read by any pattern.
    """

    local_only: bool = False
    private_kinds: tuple[str, ...] = PRIVATE_KINDS
    private_patterns: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    threshold: float = 0.5
    threshold_before: float = 0.2
    early_tokens: int = 24
    local_languages: frozenset[str] = frozenset({"en", "und"})
    max_cloud_prompt_chars: int = DEFAULT_MAX_CHARS
    #: the rules for what leaves the device, as clouds are given them
    screen: Screen = field(init=False, repr=False, compare=False)

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
        screen = Screen(tuple(self.private_kinds), self.private_patterns, most, self.local_only)
        object.__setattr__(self, "screen", screen)


def check_mode(mode: str) -> Mode:
    """`mode`, if it is one. Raises InputError."""
    for known in MODES:
        if mode == known:
            return known
    raise InputError(f"mode: {mode!r} is not allowed; choose one of {', '.join(MODES)}")
