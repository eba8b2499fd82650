"""What a reasoning model thinks is not its answer: the one place where the two are told apart.

Rules, the same for a whole text and for one that arrives in pieces:

- A block of thinking opens only at the start of an answer (after blanks, or after another block), or in the
  prompt: many chat templates end with the opening marker. A marker further on is text.
- A block that never closes is no answer: the answer is empty.
- A closing marker that nothing opened says that a template opened the block: all before it is thinking. A
  stream has shown that text by then; nothing shown is retracted, and the whole answer is what follows the
  marker. In code, in quotes, or after an opening marker in the text it is text.
- Inside a block markers nest. Where one was only mentioned, so that its block never closes, the answer is
  what follows the last closing marker; a stream shows it at its end.

Markers are compared without regard to case. Blanks before an answer are dropped where a block came before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Markers:
    """How one family of models marks its thinking, in lower case.

    `nests`: whether another `open` inside a block needs a `close` of its own. `around`: pairs that may
    enclose the answer after it, and are dropped.
    """

    open: str
    close: str
    nests: bool = True
    around: tuple[tuple[str, str], ...] = ()


_TAGS = (("<answer>", "</answer>"), ("<response>", "</response>"))
_HARMONY = (("<|message|>", "<|return|>"), ("<|constrain|>json<|message|>", "<|return|>"))

#: a family is one row
FAMILIES = (
    # DeepSeek, Qwen 3, GLM, Phi 4, SmolLM 3, Granite, MiniMax, Nemotron, Hunyuan …
    Markers("<think>", "</think>", around=_TAGS),
    Markers("<thinking>", "</thinking>", around=_TAGS),
    Markers("<thought>", "</thought>", around=_TAGS),
    Markers("<reasoning>", "</reasoning>", around=_TAGS),
    # ByteDance Seed, LongCat
    Markers("<seed:think>", "</seed:think>"),
    Markers("<longcat_think>", "</longcat_think>"),
    # Mistral's Magistral and Ministral
    Markers("[think]", "[/think]"),
    # gpt-oss: every channel before the final one is thinking
    Markers("<|channel|>analysis<|message|>", "<|channel|>final", nests=False, around=_HARMONY),
    Markers("<|channel|>commentary<|message|>", "<|channel|>final", nests=False, around=_HARMONY),
    # Gemma 4, MedGemma
    Markers("<|channel>thought", "<channel|>"),
    Markers("<unused94>thought", "<unused95>"),
    # Cohere
    Markers("<|start_thinking|>", "<|end_thinking|>", around=(("<|start_response|>", "<|end_response|>"),)),
    # OpenThinker, Sky
    Markers(
        "<|begin_of_thought|>",
        "<|end_of_thought|>",
        around=(("<|begin_of_solution|>", "<|end_of_solution|>"),),
    ),
    # Kimi-VL, Apertus
    Markers("◁think▷", "◁/think▷"),
    Markers("<|inner_prefix|>", "<|inner_suffix|>"),
)

_FAMILY = {family.open: family for family in FAMILIES}
_CLOSES = frozenset(family.close for family in FAMILIES)
_AROUND = {before: after for family in FAMILIES for before, after in family.around}
_STARTS = (*_FAMILY, *_CLOSES, *_AROUND)
_IN_TEXT = (*_FAMILY, *_CLOSES, *_AROUND.values())
_MAX_MARKER_CHARS = max(map(len, (*_STARTS, *_IN_TEXT)))
#: what stands between the messages of one harmony answer
_BETWEEN = re.compile(
    r"<\|(?:end|start)\|>(?:assistant)?|<\|channel\|>(?:analysis|commentary)<\|message\|>", re.IGNORECASE
)
#: the tokens that markers are made of
_TOKENS = frozenset(re.findall(r"<[^<>]*>|\[[^\]]*\]|◁[^▷]*▷", " ".join((*_FAMILY, *_CLOSES, *_AROUND))))
#: ASCII only: the rest keeps its length
_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")
_BLANKS = re.compile(r"\s*")
_QUOTES = frozenset("\"'“‘«‹„‚「")


def _any_of(markers: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(set(markers), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE | re.ASCII)


_START_PATTERN = _any_of(_STARTS)
_TEXT_PATTERN = _any_of(_IN_TEXT)
_BLOCK_PATTERNS = {family.open: _any_of((family.open, family.close)) for family in FAMILIES}


@dataclass(frozen=True)
class Split:
    """A text taken apart. `thinking` is None where there was none."""

    answer: str
    thinking: str | None


def opened_by(prompt: str) -> str | None:
    """The opening marker that a rendered prompt ends with, or None."""
    tail = prompt[-4 * _MAX_MARKER_CHARS :].rstrip().translate(_LOWER)
    return next((marker for marker in _FAMILY if tail.endswith(marker)), None)


def is_marker(token: str) -> bool:
    """Whether markers are made of tokens of this spelling: a decoder must not leave them out."""
    return token.translate(_LOWER) in _TOKENS


class ThinkingSplitter:
    """Takes a text apart as it arrives, wherever its pieces are cut.

    `push` and `finish` return what a stream may show: no thinking, no marker, and nothing that may still
    become one; all other text at once. The whole is in `split` once `finish` was called: its answer is what
    was shown, or, where a lone closing marker came, the end of that.
    """

    def __init__(self, prompt: str = "") -> None:
        """`prompt`: what the text continues; only its end matters."""
        opened = opened_by(prompt)
        self._state: Literal["start", "thinking", "answer"] = "start" if opened is None else "thinking"
        self._held = ""  # may be the beginning of a marker
        self._blank: list[str] = []  # blanks before the first text
        self._family = _FAMILY[opened or "<think>"]
        self._depth = 1
        self._block: list[str] = []  # the open block
        self._block_is_blank = True
        self._inner_end: int | None = None  # how many parts of it end with its last closing marker
        self._thoughts: list[str] = []  # finished blocks
        self._answer: list[str] = []
        self._after: str | None = None  # ends an enclosed answer
        self._quoting = _Quoting()
        self._opened_in_text = 0

    @property
    def in_thinking(self) -> bool:
        """Whether a block is open: the text pushed last is no answer."""
        return self._state == "thinking"

    @property
    def blocks(self) -> int:
        """Blocks that have ended; each makes all text before its end thinking."""
        return len(self._thoughts)

    def push(self, text: str) -> str:
        """Adds text; returns what may be shown now."""
        data, self._held = self._held + text, ""
        shown: list[str] = []
        steps = {"start": self._at_start, "thinking": self._in_block, "answer": self._in_text}
        at = 0
        while at < len(data):
            at = steps[self._state](data, at, shown)
        return "".join(shown)

    def finish(self) -> str:
        """Ends the text; returns what was held back and is answer after all."""
        rest, self._held = self._held, ""
        if self._state == "thinking":
            self._block.append(rest)
            end = len(self._block) if self._inner_end is None else self._inner_end
            self._thoughts.append("".join(self._block[:end]))
            rest = "".join(self._block[end:]).lstrip()
        elif self._state == "start" and not self._thoughts:
            rest = "".join([*self._blank, rest])
        self._state, self._blank, self._block = "answer", [], []
        self._answer.append(rest)
        return rest

    def split(self) -> Split:
        """The text so far, taken apart."""
        thoughts = [_BETWEEN.sub("\n", block).strip() for block in self._thoughts]
        return Split("".join(self._answer), "\n\n".join(filter(None, thoughts)) or None)

    def _at_start(self, data: str, at: int, shown: list[str]) -> int:
        """Before any answer: what follows is a block, what encloses the answer, or the answer."""
        blank = _BLANKS.match(data, at)
        assert blank is not None, "the pattern matches nothing as well"
        self._blank.append(blank[0])
        at = blank.end()
        rest = data[at : at + _MAX_MARKER_CHARS].translate(_LOWER)
        if any(marker != rest and marker.startswith(rest) for marker in _STARTS):
            return self._hold(data, at)
        found = _START_PATTERN.match(data, at)
        marker = "" if found is None else found[0].translate(_LOWER)
        if marker in _FAMILY:
            self._state, self._family = "thinking", _FAMILY[marker]
            self._depth, self._inner_end, self._block_is_blank = 1, None, True
        elif marker in _CLOSES:
            self._end_block("")
        # plain tags enclose an answer only after a block: "<answer>" may be what was asked for
        elif marker in _AROUND and (self._thoughts or marker.startswith("<|")):
            self._after = _AROUND[marker]
        else:
            self._begin_answer(shown)
            return at
        return at + len(marker)

    def _in_block(self, data: str, at: int, shown: list[str]) -> int:
        found = _BLOCK_PATTERNS[self._family.open].search(data, at)
        if found is None:
            end = len(data) - _overlap(data, at, (self._family.open, self._family.close))
            self._add_thought(data[at:end])
            return self._hold(data, end)
        self._add_thought(data[at : found.start()])
        if found[0].translate(_LOWER) == self._family.close:
            self._depth -= 1
            if self._depth == 0:
                self._end_block("".join(self._block))
                return found.end()
            self._add_thought(found[0])
            self._inner_end = len(self._block)
        elif not self._block_is_blank:
            # one at once after another is the template's and the model's: one block
            self._depth += self._family.nests
            self._add_thought(found[0])
        return found.end()

    def _in_text(self, data: str, at: int, shown: list[str]) -> int:
        found = _TEXT_PATTERN.search(data, at)
        if found is None:
            end = len(data) - _overlap(data, at, _IN_TEXT)
            self._show(data[at:end], shown)
            return self._hold(data, end)
        self._show(data[at : found.start()], shown)
        marker = found[0].translate(_LOWER)
        if marker == self._after:
            self._after = None
            return found.end()
        if not self._quoting.quoted and marker in _CLOSES:
            if self._opened_in_text == 0:
                self._end_block("".join(self._answer))
                return found.end()
            self._opened_in_text -= 1
        elif not self._quoting.quoted and marker in _FAMILY:
            self._opened_in_text += 1
        self._show(found[0], shown)
        return found.end()

    def _add_thought(self, text: str) -> None:
        self._block.append(text)
        self._block_is_blank = self._block_is_blank and not text.strip()

    def _hold(self, data: str, at: int) -> int:
        self._held = data[at:]
        return len(data)

    def _begin_answer(self, shown: list[str]) -> None:
        self._state, blank = "answer", "".join(self._blank)
        self._quoting, self._opened_in_text = _Quoting(), 0
        self._blank = []
        if not self._thoughts:
            self._show(blank, shown)

    def _end_block(self, thought: str) -> None:
        self._thoughts.append(thought)
        self._state, self._block, self._answer, self._blank = "start", [], [], []

    def _show(self, text: str, shown: list[str]) -> None:
        self._quoting.add(text)
        self._answer.append(text)
        shown.append(text)


class _Quoting:
    """Whether the end of a growing Markdown text is inside code or right after a quotation mark."""

    def __init__(self) -> None:
        self._fenced = False
        self._ticks = 0  # in this line
        self._head = ""  # first characters of this line, without blanks before them
        self._last = ""

    @property
    def quoted(self) -> bool:
        return self._fenced or self._ticks % 2 == 1 or self._last in _QUOTES

    def add(self, text: str) -> None:
        for index, line in enumerate(text.split("\n")):
            if index:
                self._fenced ^= self._head in ("```", "~~~")
                self._ticks, self._head, self._last = 0, "", "\n"
            self._ticks += line.count("`")
            if len(self._head) < 3:
                self._head += (line if self._head else line.lstrip())[: 3 - len(self._head)]
            self._last = line[-1:] or self._last


def _overlap(data: str, at: int, markers: Iterable[str]) -> int:
    """Length of the longest end of `data`, from `at` on, with which a marker begins."""
    tail = data[max(at, len(data) - _MAX_MARKER_CHARS + 1) :].translate(_LOWER)
    starts = [index for index, char in enumerate(tail) if char in "<[◁"]
    for index in starts:
        if any(marker.startswith(tail[index:]) for marker in markers):
            return len(tail) - index
    return 0
