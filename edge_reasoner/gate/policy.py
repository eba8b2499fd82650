"""What the owner of the device allows, whatever the gate thinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AnySet
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from edge_reasoner.chat.checks import check_flag, check_integer, check_number, check_texts, refuse
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
        check_flag("policy: local_only", self.local_only)
        for name in ("threshold", "threshold_before"):
            check_number(f"policy: {name}", getattr(self, name), 0.0, 1.0)
        check_integer("policy: early_tokens", self.early_tokens, 1, 4096)
        check_integer("policy: max_cloud_prompt_chars", self.max_cloud_prompt_chars, 0)
        check_texts("policy: private_patterns", self.private_patterns, "a mapping of names to patterns")
        languages = self.local_languages
        if not isinstance(languages, (set, frozenset)) or not all(isinstance(x, str) for x in languages):
            refuse("policy: local_languages", languages, "a set of language codes")
        kinds: object = self.private_kinds
        if isinstance(kinds, str) or not isinstance(kinds, (Sequence, AnySet)):
            refuse("policy: private_kinds", kinds, "names of kinds of private data")
        screen = Screen(
            tuple(self.private_kinds), self.private_patterns, self.max_cloud_prompt_chars, self.local_only
        )
        object.__setattr__(self, "screen", screen)


def check_mode(mode: str) -> Mode:
    """`mode`, if it is one. Raises InputError."""
    for known in MODES:
        if isinstance(mode, str) and mode == known:
            return known
    refuse("mode", mode, f"one of {', '.join(MODES)}")
