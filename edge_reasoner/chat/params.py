"""What a caller may say about choosing tokens and stopping."""

from __future__ import annotations

from dataclasses import dataclass

from edge_reasoner.chat.checks import check_integer, check_number, refuse
from edge_reasoner.errors import InputError
from edge_reasoner.files import is_unicode

MAX_NEW_TOKENS = 1_000_000
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 500


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop. Illegal values are refused at construction (InputError).

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 mean "off". `seed` None draws
    from the generator's own entropy. `max_tokens` None: until the context is full.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0.0, 100.0)
        check_number("top_p", self.top_p, 0.0, 1.0)
        check_number("min_p", self.min_p, 0.0, 1.0)
        check_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        check_integer("top_k", self.top_k, 0, 2**31 - 1)
        if self.max_tokens is not None:
            check_integer("max_tokens", self.max_tokens, 1, MAX_NEW_TOKENS)
        if self.seed is not None:
            check_integer("seed", self.seed, 0, 2**64 - 1)
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) for text in self.stop):
            refuse("stop", self.stop, "a tuple of strings")
        if len(self.stop) > MAX_STOP_STRINGS or any(not 0 < len(s) <= MAX_STOP_CHARS for s in self.stop):
            lengths = ", ".join(str(len(text)) for text in self.stop[: MAX_STOP_STRINGS + 1])
            raise InputError(
                f"stop={len(self.stop)} strings (of {lengths} characters): give at most {MAX_STOP_STRINGS}"
                f" strings of 1 to {MAX_STOP_CHARS} characters"
            )
        if not is_unicode(self.stop):
            refuse("stop", self.stop, "whole characters: there is a lone surrogate (\\ud800) in it")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0 or self.top_k == 1
