"""What a reasoning model thinks is not its answer: the one place where the two are told apart.

Rules, the same for a whole text and for one that arrives in pieces:

- A block of thinking opens only at the start of an answer (after blanks, or after another block), or in the
  prompt: many chat templates end with the opening marker. A marker further on is text.
- A block that never closes is no answer: the answer is empty. Where words open it ("Here is my thought
  process:"), it counts only if it also closes; else all of it is the answer.
- A closing marker that nothing opened says that a template opened the block: all before it is thinking. A
  stream has shown that text by then; nothing shown is retracted, and the whole answer is what follows the
  marker. In code, in quotes, after an opening marker in the text, or as a word of a sentence ("the </think>
  tag": a word and a space before it, a space and a small letter after it) it is text.
- Inside a block markers nest. Where one was only mentioned, so that its block never closes, the answer is
  what follows the last closing marker; a stream shows it at its end.

Markers are compared without regard to case. Blanks before an answer are dropped where a block came before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

#: what a marker that is no phrase begins with
_BRACKETS = "<[◁"


@dataclass(frozen=True)
class Markers:
    """How one family of models marks its thinking, in lower case.

    `also`: other ways to write `close`. `between`: stand between the parts of one block. `around`: pairs that
    may enclose the answer after it, and are dropped; `end`: ends the answer, and is dropped.
    """

    open: str
    close: str
    also: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    around: tuple[tuple[str, str], ...] = ()
    end: str | None = None

    @property
    def closes(self) -> tuple[str, ...]:
        """What ends a block."""
        return (self.close, *self.also)

    @property
    def inside(self) -> tuple[str, ...]:
        """What means something in a block."""
        return (self.open, *self.closes, *self.between)

    @property
    def in_words(self) -> bool:
        """Whether it opens with words, which people write too."""
        return self.open[0] not in _BRACKETS


_TAGS = (("<answer>", "</answer>"), ("<response>", "</response>"), ("<output>", "</output>"))
_HARMONY = (
    ("<|message|>", "<|return|>"),
    ("<|constrain|>json<|message|>", "<|return|>"),
    ("<|constrain|>json <|message|>", "<|return|>"),
)
#: gpt-oss writes messages: every channel before the final one is thinking, calls of tools too
_OPEN_HARMONY = (
    "<|channel|>analysis<|message|>",
    "<|channel|>commentary<|message|>",
    "<|channel|>analysis to=",
    "<|channel|>commentary to=",
)
_HARMONY_START, _SOLAR_START = "<|start|>assistant", "<|begin|>assistant"
_BETWEEN_HARMONY = (*_OPEN_HARMONY, _HARMONY_START, "<|end|>", "<|call|>", "<|message|>", "<|constrain|>")

#: a family is one row
FAMILIES = (
    # DeepSeek, Qwen 3, GLM, Phi 4, SmolLM 3, Granite 3.3, MiniMax M2, Nemotron, Hunyuan, Kimi K2, Olmo 3 …
    Markers("<think>", "</think>", around=_TAGS),
    Markers("<thinking>", "</thinking>", around=_TAGS),
    # EXAONE Deep, Marco
    Markers("<thought>", "</thought>", around=_TAGS),
    Markers("<reasoning>", "</reasoning>", around=_TAGS),
    # MiniMax M3, Hunyuan 3, ByteDance Seed, LongCat
    Markers("<mm:think>", "</mm:think>"),
    Markers("<think:opensource>", "</think:opensource>"),
    Markers("<seed:think>", "</seed:think>"),
    Markers("<longcat_think>", "</longcat_think>"),
    # Mistral's Magistral and Ministral
    Markers("[think]", "[/think]"),
    *(
        Markers(opening, "<|channel|>final", between=_BETWEEN_HARMONY, around=_HARMONY)
        for opening in _OPEN_HARMONY
    ),
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
    # Solar Open
    Markers("<|think|>", "<|content|>", between=("<|end|>", _SOLAR_START)),
    # Apriel
    Markers("here are my reasoning steps:", "[begin final response]", end="[end final response]"),
    # Granite 3.2
    Markers("here is my thought process:", "here is my response:", also=("here's my response:",)),
    Markers("here's my thought process:", "here's my response:", also=("here is my response:",)),
)

_FAMILY = {family.open: family for family in FAMILIES}
#: those that say something by themselves; words do not
_CLOSES = {close: family for family in FAMILIES for close in family.closes if close[0] in _BRACKETS}
_AROUND = {before: after for family in FAMILIES for before, after in family.around}
_ENDS = frozenset((*_AROUND.values(), *(family.end for family in FAMILIES if family.end)))
_STARTS = (*_FAMILY, *_CLOSES, *_AROUND, _HARMONY_START, _SOLAR_START)
_IN_TEXT = (*(opening for opening in _FAMILY if opening[0] in _BRACKETS), *_CLOSES, *_ENDS)
_MAX_MARKER_CHARS = max(map(len, (*_STARTS, *_IN_TEXT, *(word for f in FAMILIES for word in f.inside))))
#: the tokens that markers are made of
_TOKENS = frozenset(
    re.findall(r"<[^<>]*>|\[[^\]]*\]|◁[^▷]*▷", " ".join((*_FAMILY, *_CLOSES, *_AROUND, *_ENDS)))
)
#: markers in harmony; elsewhere they end turns
_HARMONY_TOKENS = frozenset(("<|start|>", "<|end|>"))
_FIRSTS = frozenset(word[0] for word in (*_STARTS, *_IN_TEXT, *(w for f in FAMILIES for w in f.inside)))
#: ASCII only: the rest keeps its length
_LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")
_BLANKS = re.compile(r"\s*")
_WORD_BEFORE = re.compile(r"[\w,] ")
_QUOTES = frozenset("\"'“‘«‹„‚「")


def _any_of(markers: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(set(markers), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)), re.IGNORECASE | re.ASCII)


_START_PATTERN = _any_of(_STARTS)
_TEXT_PATTERN = _any_of(_IN_TEXT)
_BETWEEN_PATTERN = _any_of(_BETWEEN_HARMONY)
_BLOCK_PATTERNS = {family.open: _any_of(family.inside) for family in FAMILIES}


@dataclass(frozen=True)
class Split:
    """A text taken apart. `thinking` is None where there was none."""

    answer: str
    thinking: str | None


def opened_by(prompt: str) -> str | None:
    """The opening marker that a rendered prompt ends with, or None."""
    tail = prompt[-4 * _MAX_MARKER_CHARS :].rstrip().translate(_LOWER)
    return next((marker for marker in _FAMILY if tail.endswith(marker)), None)


def is_marker(token: str, *, harmony: bool = False) -> bool:
    """Whether markers are made of tokens of this spelling: a decoder must not leave them out.

    `harmony`: the vocabulary has `<|channel|>`.
    """
    token = token.translate(_LOWER)
    return token in _TOKENS or (harmony and token in _HARMONY_TOKENS)


class ThinkingSplitter:
    """Takes a text apart as it arrives, wherever its pieces are cut.

    `push` and `finish` return what a stream may show: no thinking, no marker, and nothing that may still
    become one; all other text at once. `take_thought` gives the thinking as it grows. The whole is in `split`
    once `finish` was called: its answer is what was shown, or, where a lone closing marker came, the end of
    that; its thinking is what was taken, but for the cases in which only the end of a text tells.
    """

    def __init__(self, prompt: str = "") -> None:
        """`prompt`: what the text continues; only its end matters."""
        opened = opened_by(prompt)
        self._state: Literal["start", "thinking", "answer"] = "start" if opened is None else "thinking"
        self._held = ""  # may be the beginning of a marker
        self._blank: list[str] = []  # blanks before the first text
        self._family = _FAMILY[opened or "<think>"]
        self._depth = 1
        self._opening = ""  # as it was written; "" where the prompt opened the block
        self._block: list[str] = []  # the open block
        self._block_is_blank = True
        self._between = False  # a marker that separates its parts came
        self._told = _Thoughts()
        self._ended = False
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
    def before_answer(self) -> bool:
        """Whether a block is open or has ended, and nothing after it can be answer so far."""
        return self._state == "thinking" or (
            self._state == "start" and bool(self._thoughts) and not self._held
        )

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

    def take_thought(self) -> str:
        """The thinking that came since the last call, without blanks around it."""
        return self._told.take()

    def finish(self) -> str:
        """Ends the text; returns what was held back and is answer after all."""
        self._ended = True
        shown = self.push("")
        rest, self._held = self._held, ""
        if self._state == "thinking" and self._family.in_words and self._opening:
            blank = [] if self._thoughts else self._blank
            rest = "".join([*blank, self._opening, *self._block, rest])
        elif self._state == "thinking":
            self._add_thought(rest)
            end = len(self._block) if self._inner_end is None else self._inner_end
            self._thoughts.append("".join(self._block[:end]))
            rest = "".join(self._block[end:]).lstrip()
        elif self._state == "start" and not self._thoughts:
            rest = "".join([*self._blank, rest])
        self._state, self._blank, self._block = "answer", [], []
        self._answer.append(rest)
        return shown + rest

    def split(self) -> Split:
        """The text so far, taken apart."""
        thoughts = [block.strip() for block in self._thoughts]
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
            assert found is not None, "a marker was found"
            self._state, self._family, self._opening = "thinking", _FAMILY[marker], found[0]
            self._depth, self._inner_end, self._block_is_blank = 1, None, True
        elif marker in _CLOSES:
            self._end_block("", _CLOSES[marker])
        elif marker in (_HARMONY_START, _SOLAR_START):
            pass
        # plain tags enclose an answer only after a block: "<answer>" may be what was asked for
        elif marker in _AROUND and (self._thoughts or marker.startswith("<|")):
            self._after = _AROUND[marker]
        else:
            self._begin_answer(shown)
            return at
        return at + len(marker)

    def _in_block(self, data: str, at: int, shown: list[str]) -> int:
        family = self._family
        found = _BLOCK_PATTERNS[family.open].search(data, at)
        if found is None:
            end = len(data) - _overlap(data, at, family.inside)
            self._add_thought(data[at:end])
            return self._hold(data, end)
        self._add_thought(data[at : found.start()])
        marker = found[0].translate(_LOWER)
        if marker in family.closes:
            self._depth -= 1
            if self._depth == 0:
                self._end_block("".join(self._block), family)
                return found.end()
            self._add_thought(found[0])
            self._inner_end = len(self._block)
        elif marker in family.between:
            self._between = True
        elif not self._block_is_blank:
            # one at once after another is the template's and the model's: one block
            self._depth += not family.in_words
            self._add_thought(found[0])
        return found.end()

    def _in_text(self, data: str, at: int, shown: list[str]) -> int:
        found = _TEXT_PATTERN.search(data, at)
        if found is None:
            end = len(data) - _overlap(data, at, _IN_TEXT)
            self._show(data[at:end], shown)
            return self._hold(data, end)
        self._show(data[at : found.start()], shown)
        marker, quoted = found[0].translate(_LOWER), self._quoting.quoted
        if marker == self._after:
            self._after = None
            return found.end()
        if marker in _CLOSES and not quoted and self._opened_in_text == 0:
            is_word = self._quoting.is_word(data[found.end() : found.end() + 2])
            if is_word is None and not self._ended:
                return self._hold(data, found.start())
            if not is_word:
                thought = _BETWEEN_PATTERN.sub("\n", "".join(self._answer))
                self._end_block(thought, _CLOSES[marker])
                return found.end()
        elif marker in _CLOSES and not quoted:
            self._opened_in_text -= 1
        elif marker in _FAMILY and not quoted:
            self._opened_in_text += 1
        self._show(found[0], shown)
        return found.end()

    def _add_thought(self, text: str) -> None:
        if self._between:
            text = text.lstrip()
            if not text:
                return
            self._between = False
            text = text if self._block_is_blank else f"\n{text}"
        self._block.append(text)
        self._block_is_blank = self._block_is_blank and not text.strip()
        self._told.add(text)

    def _hold(self, data: str, at: int) -> int:
        self._held = data[at:]
        return len(data)

    def _begin_answer(self, shown: list[str]) -> None:
        self._state, blank = "answer", "".join(self._blank)
        self._quoting, self._opened_in_text = _Quoting(), 0
        self._blank = []
        if not self._thoughts:
            self._show(blank, shown)

    def _end_block(self, thought: str, family: Markers) -> None:
        self._thoughts.append(thought)
        self._state, self._block, self._answer, self._blank = "start", [], [], []
        self._after, self._between = family.end, False
        self._told.end_block()

    def _show(self, text: str, shown: list[str]) -> None:
        self._quoting.add(text)
        self._answer.append(text)
        shown.append(text)


class _Thoughts:
    """Thinking as it is told: no blanks around a block, a blank line between two."""

    def __init__(self) -> None:
        self._new: list[str] = []
        self._blank: list[str] = []
        self._gap = ""
        self._begun = False

    def add(self, text: str) -> None:
        if not self._begun:
            text = text.lstrip()
        kept = text.rstrip()
        if kept:
            before = "".join(self._blank) if self._begun else self._gap
            self._new.append(before + kept)
            self._begun, self._gap, self._blank = True, "\n\n", []
        self._blank.append(text[len(kept) :])

    def end_block(self) -> None:
        self._begun, self._blank = False, []

    def take(self) -> str:
        told, self._new = "".join(self._new), []
        return told


class _Quoting:
    """What a marker at the end of a growing Markdown text is: inside code, quoted, a word of a sentence."""

    def __init__(self) -> None:
        self._fenced = False
        self._ticks = 0  # in this line
        self._head = ""  # first characters of this line, without blanks before them
        self._last = ""
        self._tail = ""  # the last two characters

    @property
    def quoted(self) -> bool:
        return self._fenced or self._ticks % 2 == 1 or self._last in _QUOTES

    def is_word(self, after: str) -> bool | None:
        """Whether a marker here, before `after` (two characters), is a word of a sentence; None: more of the
        text must tell."""
        if not _WORD_BEFORE.fullmatch(self._tail):
            return False
        if after in ("", " "):
            return None
        return after[0] == " " and after[1:].islower()

    def add(self, text: str) -> None:
        self._tail = (self._tail + text[-2:])[-2:]
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
    starts = [index for index, char in enumerate(tail) if char in _FIRSTS]
    for index in starts:
        if any(marker.startswith(tail[index:]) for marker in markers):
            return len(tail) - index
    return 0
