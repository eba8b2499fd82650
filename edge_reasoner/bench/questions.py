"""Questions with known answers: the rows that `eval` reads, and how an answer is judged.

Rows: {"question", "choices": […], "answer": index} or {"question", "answer": "…"}. The public sets' names are
taken too: `query` for question, `gold` for the index, and GSM8K's answers, whose result follows "####".
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Literal

from edge_reasoner.errors import InputError
from edge_reasoner.files import read_rows

Metric = Literal["choice", "number", "exact"]
MAX_CHOICES = 26

#: a number as people write it: sign, thousands separators, decimals
_NUMBER = re.compile(r"[-+−]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+−]?\.\d+")
_MAX_NUMBER_CHARS = 40
_TOLERANCE = Decimal("1e-6")
_LETTER_STATED = re.compile(r"(?i:answer|option|choice)(?:\s*is)?[:(\[*\s]*([A-Z])\b(?!['’])")
_LETTER_FIRST = re.compile(r"^\W*([A-Z])(?=$|[\s.,:;)\]*])")


@dataclass(frozen=True)
class Question:
    """One row. `choices` empty: an open question, whose answer is `expected`; else `gold` is its index.

    `context` is what comes before a choice when its likelihood is scored.
    """

    line: int
    text: str
    context: str
    metric: Metric
    choices: tuple[str, ...] = ()
    gold: int = 0
    expected: str = ""


def read_questions(path: Path, *, metric: str = "auto", limit: int | None = None) -> list[Question]:
    """The first `limit` rows (None: all). Raises InputError naming the line and field."""
    questions = []
    for line, row in read_rows(path):
        questions.append(_question(row, metric, line, f"{path} line {line}"))
        if len(questions) == limit:
            break
    return questions


def lettered_prompt(question: Question) -> str:
    """The question with lettered choices, for a model whose likelihoods cannot be read."""
    lines = [f"{string.ascii_uppercase[i]}. {choice}" for i, choice in enumerate(question.choices)]
    return "\n".join([question.text, *lines, "Answer with the letter of the right choice only."])


def is_correct(question: Question, answer: str) -> bool:
    """Whether a generated text, without its thinking, answers the question. An empty one never does."""
    if not answer.strip():
        return False
    if question.metric == "choice":
        return _chosen(answer, question.choices) == question.gold
    if question.metric == "number":
        found, expected = last_number(answer), last_number(question.expected)
        return found is not None and expected is not None and abs(found - expected) <= _TOLERANCE
    return normalized(answer) == normalized(question.expected)


def last_number(text: str) -> Decimal | None:
    """The last number in a text, or None; "1,000", "−3" and "$20.00" are 1000, −3 and 20."""
    found = None
    for match in _NUMBER.finditer(text):
        found = match
    if found is None or len(found[0]) > _MAX_NUMBER_CHARS:
        return None
    # a hyphen right after a word or number is no minus sign: "10-2"
    digits = found[0].replace(",", "").replace("−", "-")
    if digits[0] in "+-" and found.start() > 0 and text[found.start() - 1].isalnum():
        digits = digits[1:]
    try:
        return Decimal(digits)
    except InvalidOperation:
        return None


def normalized(text: str) -> str:
    """For comparing: NFKC, case folded, spaces collapsed, outer punctuation dropped."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).strip(string.punctuation + " ")


def _chosen(answer: str, choices: tuple[str, ...]) -> int | None:
    """Index of the choice that a text names: by the choice's own words, else by a letter."""
    for index, choice in enumerate(choices):
        if normalized(answer) == normalized(choice):
            return index
    match = _LETTER_FIRST.search(answer.strip()) or _LETTER_STATED.search(answer)
    if match is None:
        return None
    index = string.ascii_uppercase.index(match[1])
    return index if index < len(choices) else None


def _question(row: Mapping[str, Any], metric: str, line: int, where: str) -> Question:
    field = "query" if "query" in row and "question" not in row else "question"
    text = row.get(field)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{where}: {field}: a text that is not empty is needed")
    if "choices" in row:
        if metric not in ("auto", "choice"):
            raise InputError(f"{where}: has choices; metric={metric} needs an answer text (allowed: choice)")
        return _choice_question(row, text, _context(text, field), line, where)
    if metric == "choice":
        raise InputError(f"{where}: choices: missing; metric=choice needs them")
    return _open_question(row, metric, text, line, where)


def _context(text: str, field: str) -> str:
    """As the public evaluation harnesses put it: a `query` without "Question:" is a sentence to complete."""
    if field == "question" and not text.startswith("Question:"):
        return f"Question: {text}\nAnswer:"
    return f"{text}\nAnswer:" if text.startswith("Question:") else text.rstrip()


def _choice_question(row: Mapping[str, Any], text: str, context: str, line: int, where: str) -> Question:
    choices = row["choices"]
    if (
        not isinstance(choices, list)
        or not 2 <= len(choices) <= MAX_CHOICES
        or not all(isinstance(choice, str) and choice.strip() for choice in choices)
    ):
        raise InputError(f"{where}: choices: a list of 2 to {MAX_CHOICES} texts is needed")
    field = "gold" if "gold" in row and "answer" not in row else "answer"
    gold = row.get(field)
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise InputError(f"{where}: {field}: the right choice's index is needed, 0 to {len(choices) - 1}")
    return Question(line, text, context, "choice", tuple(choices), gold)


def _open_question(row: Mapping[str, Any], metric: str, text: str, line: int, where: str) -> Question:
    answer = row.get("answer")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if not isinstance(answer, str) or not answer.strip():
        raise InputError(f"{where}: answer: a text or a number is needed (or choices and an index)")
    expected = answer.rpartition("####")[2].strip()
    numeric = last_number(expected) is not None
    if metric == "number" and not numeric:
        raise InputError(f"{where}: answer: no number in {expected[:60]!r}; metric=number needs one")
    is_number = metric == "number" or (metric == "auto" and numeric and _is_only_number(expected))
    return Question(line, text, text, "number" if is_number else "exact", expected=expected)


def _is_only_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip().strip("$€£% .")) is not None
