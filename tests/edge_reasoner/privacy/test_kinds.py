"""What is private is found as people write it, and ordinary texts are left alone."""

from __future__ import annotations

import csv
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.private_spellings import CARD, IBAN, MAIL, ORDINARY, SPELLINGS, ZERO_WIDTH, token, wide

from edge_reasoner.privacy.fold import folded, views
from edge_reasoner.privacy.kinds import KINDS
from edge_reasoner.privacy.screen import Screen

SCREEN = Screen()
#: texts of the public question sets that may be vetoed though nothing in them is private: 1 in 10,000
MOST_FALSE = 1e-4


@pytest.mark.parametrize(
    ("kind", "text"), [(kind, text) for kind, texts in SPELLINGS.items() for text in texts]
)
def test_every_spelling_is_found(kind: str, text: str) -> None:
    """By itself, and within a sentence of another script; case by case."""
    assert kind in SCREEN.matches(text)
    assert kind in SCREEN.matches(f"请看 {text}\n谢谢，再见")


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_texts_are_free(text: str) -> None:
    """Questions about passwords, code, mathematics, versions, dates and identifiers are not private."""
    assert SCREEN.matches(text) == ()


def _question_texts(data: Path) -> Iterator[str]:
    for path in sorted((data / "questions").glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            yield from (value for value in json.loads(line).values() if isinstance(value, str))
    with (data / "routing" / "mmlu_mixtral_gpt4.csv").open(encoding="utf-8", newline="") as file:
        yield from (row["prompt"] for row in csv.DictReader(file))


@pytest.mark.slow
def test_public_questions_are_free(public_data: Path) -> None:
    """Of the public questions (mathematics and science, English and Chinese) hardly any is vetoed, but for
    those that hold somebody's address."""
    texts = list(_question_texts(public_data))
    wrong = [
        found for text in texts if (found := SCREEN.matches(text)) and not re.search(r"\w@\w+\.\w", text)
    ]
    assert len(texts) > 10_000 and len(wrong) <= MOST_FALSE * len(texts), wrong[:5]


@given(
    st.sampled_from([CARD, IBAN, MAIL, token("gh" + "p_", 36)]),
    st.lists(
        st.tuples(st.integers(0, 40), st.sampled_from([ZERO_WIDTH, "\u2060", "\u00ad", "\ufe0f", "\u200e"]))
    ),
    st.booleans(),
)
def test_invisible_characters_hide_nothing(secret: str, marks: list[tuple[int, str]], is_wide: bool) -> None:
    """Format characters anywhere, and full-width letters, change nothing."""
    kinds, text = SCREEN.matches(secret), wide(secret) if is_wide else secret
    for at, mark in marks:
        text = text[: at % len(text)] + mark + text[at % len(text) :]
    assert kinds and SCREEN.matches(text) == kinds


@given(st.text(max_size=60))
def test_folding_is_stable_and_never_fails(text: str) -> None:
    """Folded twice is folded once; all detectors take whatever comes."""
    once = folded(text)
    assert folded(once) == once
    for view in views(text):
        assert all(isinstance(found(view), bool) for found in KINDS.values())


@given(st.text("4111 5-./xX\n\u200b@:=pwd\"'passwordDE89", max_size=80))
def test_detectors_never_fail_near_their_kinds(text: str) -> None:
    """Texts of the characters that matter raise nothing."""
    SCREEN.matches(text)


@pytest.mark.parametrize(
    "unit",
    [
        *(
            "!",
            "1 ",
            "a@",
            "password ",
            "password: ",
            "4111 ",
            "\\u",
            "de89",
            "pin ",
            "sk-",
            "://a:",
            "(at) ",
        ),
        *(
            "eyJa.",
            "key ",
            "1.",
            "- ",
            "\u0301\u0316",
            "ﷺ",
            "Bearer ",
            "11-",
            "token_",
            "AKIA",
            "password for ",
            "%25",
            "&#",
            "_",
        ),
    ],
)
def test_no_text_takes_long(unit: str) -> None:
    """Half a million characters of what patterns stumble over are read in processor seconds of single digits:
    a quadratic pattern would take hours."""
    spent_s = time.process_time()
    SCREEN.matches((unit * 500_000)[:500_000])
    assert time.process_time() - spent_s < 60
