"""Rows of questions, and how answers are judged."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_reasoner.bench.questions import Question, is_correct, last_number, lettered_prompt, read_questions
from edge_reasoner.errors import InputError

DATA = Path(__file__).parents[3] / ".." / "shared" / "data" / "questions"


def _read(tmp_path: Path, *rows: object, **options: object) -> list[Question]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_questions(path, **options)


def test_shapes(tmp_path: Path) -> None:
    """Own and public field names, with the harness's contexts."""
    rows = _read(
        tmp_path,
        {"question": "Why?", "choices": ["a", "b"], "answer": 1, "id": 7},
        {"query": "Question: Why?", "choices": ["a", "b"], "gold": 1},
        {"query": "Because of the ", "choices": ["a", "b", "c"], "gold": 2},
        {"question": "How many?", "answer": "6 + 66 = <<6+66=72>>72\n#### 1,072"},
        {"question": "Who?", "answer": "Ada"},
        {"question": "How much?", "answer": 2.5},
    )
    assert [row.context for row in rows[:3]] == ["Question: Why?\nAnswer:"] * 2 + ["Because of the"]
    assert [row.gold for row in rows[:3]] == [1, 1, 2]
    assert [row.metric for row in rows] == ["choice"] * 3 + ["number", "exact", "number"]
    assert [row.expected for row in rows[3:]] == ["1,072", "Ada", "2.5"]
    assert lettered_prompt(rows[0]).split("\n")[:3] == ["Why?", "A. a", "B. b"]


@pytest.mark.parametrize(
    ("row", "metric", "expected"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "auto", "question"),
        ({"question": " ", "answer": "x"}, "auto", "question"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "auto", "choices"),
        ({"question": "q", "choices": ["a", ""], "answer": 0}, "auto", "choices"),
        ({"question": "q", "choices": "ab", "answer": 0}, "auto", "choices"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, "auto", "0 to 1"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "auto", "index"),
        ({"question": "q", "choices": ["a", "b"], "gold": "A"}, "auto", "gold"),
        ({"question": "q"}, "auto", "answer"),
        ({"question": "q", "answer": "x"}, "number", "no number"),
        ({"question": "q", "answer": "x"}, "choice", "choices: missing"),
        ({"question": "q", "choices": ["a", "b"], "answer": 0}, "number", "allowed: choice"),
    ],
)
def test_bad_rows(tmp_path: Path, row: dict, metric: str, expected: str) -> None:
    """Each is one line with file, line number and field."""
    with pytest.raises(InputError, match=expected) as caught:
        _read(tmp_path, row, metric=metric)
    assert "rows.jsonl line 1: " in str(caught.value) and "\n" not in str(caught.value)


def test_limit_takes_the_first(tmp_path: Path) -> None:
    """A limit stops before later rows are even looked at."""
    assert len(_read(tmp_path, {"question": "q", "answer": "x"}, {"bad": 1}, limit=1)) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$20.00", "20"),
        ("so 1,234,567.5 in all.", "1234567.5"),
        ("−3", "-3"),
        ("10-2", "2"),
        ("it is -2.", "-2"),
        ("3/4 or .75", "0.75"),
        ("none", None),
        ("9" * 100, None),
        ("12,34", "34"),
    ],
)
def test_last_number(text: str, expected: str | None) -> None:
    """Numbers as people write them."""
    assert last_number(text) == (None if expected is None else Decimal(expected))


@given(st.decimals(-(10**12), 10**12, places=3), st.text("abc, .:$", max_size=10))
def test_last_number_reads_formatted_ones(value: Decimal, before: str) -> None:
    """Any number with thousands separators is read back, whatever words come before it."""
    assert last_number(f"{before} = {value:,}.") == value


@given(st.text(max_size=80))
def test_judging_never_fails(text: str) -> None:
    """Any answer text can be judged by every metric."""
    for question in (
        Question(1, "q", "q", "choice", ("one", "two")),
        Question(1, "q", "q", "number", expected="5"),
        Question(1, "q", "q", "exact", expected="x"),
    ):
        assert is_correct(question, text) in (True, False)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", True),
        ("B.", True),
        ("(b) no", False),
        ("**B**", True),
        ("The answer is B because", True),
        ("Answer: (B)", True),
        ("A. one", False),
        ("Two", True),
        ("I think so", False),
        ("Z", False),
        ("", False),
        ("A man", False),
    ],
)
def test_letters(answer: str, right: bool) -> None:
    """The chosen letter is read from what models write."""
    assert is_correct(Question(1, "q", "q", "choice", ("one", "two"), gold=1), answer) is right


def test_no_answer_is_never_right() -> None:
    """Not even where nothing but punctuation was expected."""
    assert not is_correct(Question(1, "q", "q", "exact", expected="?"), "")
    assert is_correct(Question(1, "q", "q", "exact", expected="?"), "?")


def test_open_answers() -> None:
    """By the last number, or as a whole but for case, spaces and outer punctuation."""
    number = Question(1, "q", "q", "number", expected="72")
    assert is_correct(number, "She sold 48, so $72.00 in all.") and not is_correct(number, "72 or 73")
    exact = Question(1, "q", "q", "exact", expected="New  York")
    assert is_correct(exact, " new york. ") and not is_correct(exact, "New York City")


@pytest.mark.parametrize(
    ("name", "count"), [("arc_easy", 2376), ("openbook_qa", 500), ("piqa", 1838), ("gsm8k_test", 1319)]
)
def test_public_sets(name: str, count: int) -> None:
    """The public sets are read whole; GSM8K's own answers are all right."""
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip("../shared/data/questions is not here")
    questions = read_questions(path)
    assert len(questions) == count
    assert {q.metric for q in questions} == {"number" if name.startswith("gsm8k") else "choice"}
    assert all(is_correct(q, q.expected if q.metric == "number" else q.choices[q.gold]) for q in questions)
