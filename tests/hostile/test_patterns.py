"""Regular expressions take time that grows as the text does, whatever stands in it."""

from __future__ import annotations

import gc
import importlib
import itertools
import re
import time
from collections.abc import Iterator

import pytest

from edge_reasoner.preprocess.features import extract

#: what hostile texts repeat
_UNITS = (
    *(
        "!",
        "a",
        "1",
        " ",
        "\n",
        "\t",
        ".",
        "-",
        "_",
        ",",
        ":",
        ";",
        "/",
        "'",
        '"',
        "<",
        "[",
        "]",
        "(",
        "{",
        "}",
    ),
    *(
        "|",
        "=",
        "*",
        "+",
        "@",
        "#",
        "%",
        "$",
        "`",
        "?",
        "&",
        "\\",
        "。",
        "！",
        "一",
        "比",
        "é",
        "A",
        "0",
        "1 ",
        "a ",
    ),
    *(
        "1,",
        "a.",
        "a-",
        "- ",
        "1.",
        "::",
        "://",
        "a_",
        "1111,",
        "a:b ",
        "'s",
        "\r\n",
        ": ",
        "\n:",
        "[a",
        "`$",
    ),
)
#: what a run of them may follow
_BEFORE = ("", "a", "1")
#: what a run behind a word of the pattern is made of
_BEHIND_WORDS = (" ", "a", "1")
#: modules that look for their patterns in texts of strangers; elsewhere whole names are matched
_SEARCHING = (
    *("edge_reasoner.errors", "edge_reasoner.preprocess.features", "edge_reasoner.preprocess.language"),
    *(
        "edge_reasoner.bench.questions",
        "edge_reasoner.chat.thinking",
        "edge_reasoner.contract.template.guard",
    ),
    *("edge_reasoner.cloud.dialect", "edge_reasoner.cloud.model_list", "edge_reasoner.cloud.parts"),
    *("edge_reasoner.cloud.redact", "edge_reasoner.cloud.retry", "edge_reasoner.cloud.roles"),
    *("edge_reasoner.cloud.sse", "edge_export.checkpoint.chat_template"),
)
#: a text that takes longer than this (of processor time) is long enough for its time to mean something
_MEASURABLE_S = 0.001
_LONGEST = 1 << 16


def _patterns_in(value: object, depth: int = 2) -> Iterator[re.Pattern]:
    if isinstance(value, re.Pattern):
        yield value
    elif isinstance(value, (tuple, list, set, frozenset)) and depth:
        for each in value:
            yield from _patterns_in(each, depth - 1)
    elif isinstance(value, dict) and depth:
        yield from _patterns_in(tuple(value.values()), depth - 1)


def _all_patterns() -> dict[str, re.Pattern]:
    found = {
        pattern: f"{module.__name__}.{name}"
        for module in map(importlib.import_module, _SEARCHING)
        for name, value in vars(module).items()
        for pattern in _patterns_in(value)
    }
    return {name: pattern for pattern, name in found.items()}


def _seconds(pattern: re.Pattern, text: str | bytes) -> float:
    """Processor time of a search, of the quickest of three where that is quick."""
    took: list[float] = []
    while len(took) < 3 and (not took or took[-1] < 0.02):
        start = time.thread_time()
        pattern.search(text)
        took.append(time.thread_time() - start)
    return min(took)


def _grows_too_fast(pattern: re.Pattern, before: str, unit: str) -> bool:
    """Whether doubling the text takes more than three times as long, twice in a row, where that is measurable
    at all."""
    count = 64
    slow = 0
    previous_s = None
    while count <= _LONGEST:
        text = before + unit * (count // len(unit)) + "\x01"
        took_s = _seconds(pattern, text.encode() if isinstance(pattern.pattern, bytes) else text)
        if previous_s is not None and previous_s > _MEASURABLE_S:
            slow = slow + 1 if took_s > 3 * previous_s else 0
            if slow == 2 or took_s < 2.5 * previous_s:
                return slow == 2
        previous_s = took_s
        # what is far from measurable goes up in larger steps
        count *= 2 if took_s > _MEASURABLE_S / 16 else 8
    return False


def _suspects(pattern: re.Pattern) -> Iterator[tuple[str, str]]:
    """Runs behind each word of the pattern, and behind nothing."""
    source = pattern.pattern
    words = re.findall(r"[A-Za-z]{2,}", source.decode() if isinstance(source, bytes) else source)
    yield from itertools.product(_BEFORE, _UNITS)
    yield from itertools.product(dict.fromkeys(words), _BEHIND_WORDS)
    for word in dict.fromkeys(words):
        yield "", word
        yield "", f"{word} "


def _quick_look(pattern: re.Pattern, before: str, unit: str) -> bool:
    """Whether eight times the text costs clearly more than that: worth a closer look."""
    took = []
    for count in (128, 1024):
        text = before + unit * (count // len(unit)) + "\x01"
        subject = text.encode() if isinstance(pattern.pattern, bytes) else text
        start = time.thread_time()
        pattern.search(subject)
        took.append(time.thread_time() - start)
    return took[1] > 0.00005 and took[1] > 14 * took[0]


def test_every_pattern_is_linear() -> None:
    """Runs of anything, behind nothing and behind each word of the pattern."""
    patterns = _all_patterns()
    assert len(patterns) > 30
    gc.disable()
    try:
        guilty = [
            (name, before, unit)
            for name, pattern in patterns.items()
            for before, unit in _suspects(pattern)
            if _quick_look(pattern, before, unit) and _grows_too_fast(pattern, before, unit)
        ]
    finally:
        gc.enable()
    assert guilty == []


def test_the_measure_finds_what_is_quadratic() -> None:
    """Patterns of the kind that was mended, and one that is linear."""
    assert _grows_too_fast(re.compile(r"[.!?]+(?:\s|$)"), "", "!")
    assert _grows_too_fast(re.compile(r"answer\s*(?:is|:)?\s*[:\s]*([A-Z])"), "answer", " ")
    assert _grows_too_fast(re.compile(r"select\s.+\sfrom"), "", "select ")
    assert not _grows_too_fast(re.compile(r"(?<![.!?])[.!?]+(?:\s|$)"), "", "!")


@pytest.mark.parametrize(
    "unit", ["!", "?", "。", "一", "select ", "A) ", "; ", "1 - ", "比a", "```", "\n", "in en"]
)
@pytest.mark.parametrize("tail", ["x", ""])
def test_features_cost_no_more_than_their_text(unit: str, tail: str) -> None:
    """A hostile prompt of 19,000 characters takes a few times as long as a quarter, and not sixteen times."""

    def seconds(count: int) -> float:
        start = time.thread_time()
        extract(unit * (count // len(unit)) + tail)
        return time.thread_time() - start

    long_s, short_s = (min(seconds(count) for _ in range(5)) for count in (19_000, 4_750))
    assert long_s < 10 * short_s
