"""Language, intent and prompt features."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_reasoner.preprocess.features import PromptFeatures, extract
from edge_reasoner.preprocess.language import identify

QUESTIONS = Path(__file__).parents[4] / "shared" / "data" / "questions"

SENTENCES = {
    "en": "What is the capital of the country that lies between France and Germany?",
    "de": "Wie heißt die Hauptstadt des Landes, das zwischen Frankreich und Deutschland liegt?",
    "fr": "Quelle est la capitale du pays qui se trouve entre la France et l'Allemagne ?",
    "es": "¿Cuál es la capital del país que está entre Francia y Alemania?",
    "it": "Qual è la capitale del paese che si trova tra la Francia e la Germania?",
    "pt": "Qual é a capital do país que fica entre a França e a Alemanha?",
    "nl": "Wat is de hoofdstad van het land dat tussen Frankrijk en Duitsland ligt?",
    "ru": "Какой город является столицей страны, которая находится между Францией и Германией?",
    "zh": "位于法国和德国之间的国家的首都是哪里？",
    "ja": "フランスとドイツの間にある国の首都はどこですか？",
    "ko": "프랑스와 독일 사이에 있는 나라의 수도는 어디입니까?",
    "ar": "ما هي عاصمة البلد الذي يقع بين فرنسا وألمانيا؟",
    "el": "Ποια είναι η πρωτεύουσα της χώρας;",
    "he": "מהי בירת המדינה?",
    "hi": "देश की राजधानी क्या है?",
    "th": "เมืองหลวงของประเทศคืออะไร",
    "und": "42 + 17 = ?",
}
INTENTS = {
    "maths": [
        "What is 17 * 23 + 5?",
        "How many apples are left if 3 of 10 are eaten?",
        "小明有12个苹果，吃了5个，还剩多少个？",
    ],
    "code": ["Write a Python function that reverses a list.", "Why does `x == y` fail?\n```\nx = 1\n```"],
    "translation": [
        "Translate 'good morning' into German.",
        "Übersetze das ins Englische: Haus",
        "请翻译这句话",
    ],
    "summary": ["Summarize the following text: …", "Fasse den Text zusammen."],
    "reasoning": ["Explain why the sky is blue.", "Warum ist der Himmel blau?"],
    "creative": ["Write a poem about rain."],
    "choice": ["Which one flies?\nA. a stone\nB. a bird\nC. a fish"],
    "chat": ["Hello!", "Guten Morgen", "thanks a lot", "你好"],
    "question": ["What is the capital of France?"],
}


@pytest.mark.parametrize("code", SENTENCES)
def test_language(code: str) -> None:
    """One ordinary sentence of each language is recognized."""
    assert identify(SENTENCES[code]).code == code


@pytest.mark.parametrize(("intent", "text"), [(i, t) for i, texts in INTENTS.items() for t in texts])
def test_intent(intent: str, text: str) -> None:
    """Plain examples of each intent get it."""
    assert extract(text).intent == intent


@given(st.text())
def test_any_text_has_features(text: str) -> None:
    """Any text gives features with stable order, finite numbers, and JSON."""
    features = extract(text)
    assert list(features.as_dict()) == list(PromptFeatures.__dataclass_fields__)
    assert json.loads(json.dumps(features.as_dict())) == features.as_dict()
    assert all(value >= 0 for value in features.numeric().values())


@pytest.mark.parametrize(
    "text",
    [
        "a" * 200_000,
        "1 " * 100_000,
        "1" * 200_000,
        "A) x " * 40_000,
        "+ " * 100_000,
        "a+" * 100_000,
        "-\n" * 100_000,
    ],
)
def test_no_text_takes_long(text: str) -> None:
    """No rule backtracks: 200,000 hostile characters take well under a second of processor time."""
    start_s = time.process_time()
    extract(text)
    assert time.process_time() - start_s < 5


def test_grade_school_maths_is_seen() -> None:
    """Of 300 public maths word problems and 300 science questions, most of the former and few of the latter
    are called maths."""
    if not QUESTIONS.is_dir():
        pytest.skip("needs the public question sets in ../shared/data")

    def share(name: str, field: str) -> float:
        lines = (QUESTIONS / name).read_text("utf-8").splitlines()[:300]
        return sum(extract(json.loads(line)[field]).is_maths for line in lines) / len(lines)

    assert share("gsm8k_test.jsonl", "question") > 0.8
    assert share("arc_easy.jsonl", "query") < 0.1
