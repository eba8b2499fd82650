r"""Which regular expressions a tokenizer may use: the known ones of model families, and plainly linear ones.

The library runs them with a backtracking engine, over texts of millions of characters, so an expression such
as `(a+)+$` would never end. Accepted are

    known    the expressions below, as the families write them; each takes linear time because its last
             branches take whatever the earlier ones had to give back
    plain    branches of single characters and classes, where after the first repetition without an end
             nothing is required any more (` ?\p{L}+`, `\p{N}{1,3}`, ` {2,}`): such a branch never goes back
"""

from __future__ import annotations

import re
from typing import Final

GPT2: Final = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION: Final = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES: Final = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3: Final = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
QWEN2: Final = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
_UPPER: Final = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER: Final = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
GPT4O: Final = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
DEEPSEEK_V3_WORDS: Final = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_SPACES}"
)
#: cl100k: OpenAI's, with possessive repetitions, and as others write it
_CL100K: Final = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+",
)
#: the same with letters and their marks as words, as newer Qwen models have it
_WITH_MARKS: Final = (
    rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_SPACES}"
)
#: how SentencePiece's and CLIP's treatment of spaces is written by transformers' converters
_CONVERTED: Final = (
    r"\A +| +\z",
    r"\A▁",
    r"\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
)
KNOWN_PATTERNS: Final = frozenset(
    (GPT2, LLAMA3, QWEN2, TEKKEN, GPT4O, DEEPSEEK_V3_WORDS, *_CL100K, _WITH_MARKS, *_CONVERTED)
)
MAX_PATTERN_CHARS: Final = 1000
#: ways in which the bounded start of a branch may match
_MAX_CHOICES: Final = 64

#: one character or class, and how often it may come; or the contractions
_ELEMENT: Final = re.compile(
    r"""(?P<atom> \\[pP]\{\^?[A-Za-z_]{1,30}\} | \\[sSdDwWrnt] | \\[^A-Za-z0-9\s]
        | \[\^?\]?(?:\\[pP]\{\^?[A-Za-z_]{1,30}\}|\\[sSdDwWrnt]|\\[^A-Za-z0-9\s]|[^\[\]\\&])+\]
        | [^\\\[\](){}.^$|?*+] | \. )
        (?P<times> [?*+] | \{\d{1,3}(?:,\d{0,3})?\} )?""",
    re.VERBOSE | re.DOTALL,
)


def is_accepted(pattern: str) -> bool:
    """Whether the expression is a known one, or plainly takes linear time."""
    if len(pattern) > MAX_PATTERN_CHARS:
        return False
    return pattern in KNOWN_PATTERNS or all(_never_goes_back(branch) for branch in _branches(pattern))


def _branches(pattern: str) -> list[str]:
    """The alternatives of a pattern without groups."""
    branches, start, in_class, at = [], 0, False, 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char == "|":
            branches.append(pattern[start:at])
            start = at + 1
        at += 1
    return [*branches, pattern[start:]]


def _never_goes_back(branch: str) -> bool:
    """Whether a branch takes at least one character, and requires nothing after an endless repetition."""
    at, choices, least, endless = 0, 1, 0, False
    while at < len(branch):
        found = _ELEMENT.match(branch, at)
        if found is None or branch[found.end() : found.end() + 1] in ("?", "+", "*"):
            return False
        low, high = _bounds(found["times"])
        if (endless and low > 0) or (high is not None and not low <= high <= _MAX_CHOICES):
            return False
        if high is None:
            endless = True
        elif not endless:
            choices *= high - low + 1
        least += low
        at = found.end()
    return 1 <= least <= _MAX_CHOICES and choices <= _MAX_CHOICES


def _bounds(times: str | None) -> tuple[int, int | None]:
    """How often an element comes: at least, and at most (None: without an end)."""
    if times is None:
        return 1, 1
    if times in ("?", "*", "+"):
        return int(times == "+"), 1 if times == "?" else None
    low, comma, high = times[1:-1].partition(",")
    if not comma:
        return int(low), int(low)
    return int(low), int(high) if high else None
