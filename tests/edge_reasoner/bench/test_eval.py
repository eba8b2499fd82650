"""Scores of choices against transformers, and the figures made of them."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest
from support.answering_bundle import reference_log_likelihood, tokenizer, write_answering_bundle
from support.hostile_cloud import HEAD, event, scripted_cloud
from support.local_models import scripted_model

from edge_reasoner.backends.fake import FakeDecoder
from edge_reasoner.bench.eval import ChoiceScorer, Result, ask_questions, score_choices, summarize
from edge_reasoner.bench.questions import Question
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.cloud import connect
from edge_reasoner.cloud.base import CloudOptions
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.errors import ContextOverflowError, InputError
from edge_reasoner.preprocess.preprocessor import Preprocessor
from edge_reasoner.query.assemble import Machine
from edge_reasoner.query.device import Device
from edge_reasoner.reasoner import Reasoner

CHOICES = ("a dog", "a doge runs far", "cat", "x")
BOS = 1


def test_scores_against_transformers(tmp_path: Path) -> None:
    """Each choice's right and wrong agree with transformers' log-likelihoods of the whole texts."""
    bundle = open_bundle(write_answering_bundle(tmp_path / "bundle", exact=True))
    encode = tokenizer().encode
    questions, expected = [], []
    for index, text in enumerate(["Which animal barks?", "Q", "What is 2 + 2? " * 6]):
        context = f"Question: {text}\nAnswer:"
        ids = [BOS, *encode(context).ids]
        sums = [
            reference_log_likelihood([BOS, *encode(f"{context} {choice}").ids], len(ids))
            for choice in CHOICES
        ]
        per_character = [value / len(choice) for value, choice in zip(sums, CHOICES, strict=True)]
        for gold in range(len(CHOICES)):
            questions.append(Question(index, text, context, "choice", CHOICES, gold))
            expected.append((int(np.argmax(per_character)) == gold, int(np.argmax(sums)) == gold))
    machine = Machine(threads=1, cache_dir=tmp_path / "cache")
    steps: list[int] = []
    results = score_choices(bundle, machine, questions, lambda: steps.append(1))
    assert [(result.correct, result.by_sum) for result in results] == expected
    assert len(steps) == len(questions)


def test_log_likelihoods_against_transformers(tmp_path: Path) -> None:
    """The log-likelihoods themselves: within 1e-3 nats, in any order, whatever was scored before."""
    from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder

    bundle = open_bundle(write_answering_bundle(tmp_path / "bundle", exact=True))
    component = bundle.component("reasoner")
    model = OrtDecoder(bundle.path_of("graphs/fp32.onnx"), component.spec)
    encode = tokenizer().encode
    scorer = ChoiceScorer(model, model.new_cache(128), lambda text: encode(text).ids, BOS)
    for context, choices in (
        ("Why is it?", [" so", " so it is", " no"]),
        ("Z", ["a", "b"]),
        ("Why is it?", [" so", "!"]),
    ):
        start = 1 + len(encode(context).ids)
        expected = [reference_log_likelihood([BOS, *encode(context + c).ids], start) for c in choices]
        assert scorer.score(context, choices) == pytest.approx(expected, abs=1e-3)


def test_shared_context_is_fed_once() -> None:
    """Only the last token of the question and each choice's own tokens are fed again."""
    model = FakeDecoder(300, 256)
    scorer = ChoiceScorer(model, model.new_cache(), lambda text: list(text.encode()), None)
    scores = scorer.score("q" * 100, [" a", " bcd"])
    assert scores == pytest.approx([-2 * math.log(300), -4 * math.log(300)])
    assert (model.fed_tokens, model.calls) == (100 + 1 + (1 + 3), 2)


def test_tokens_that_merge_across_the_boundary() -> None:
    """A tokenizer that merges question and choice: the tokens beyond the question's own number count."""
    model = FakeDecoder(300, 64)
    encode = {"ab": [1, 2], "ab c": [1, 9], "ab cd": [1, 9, 4], "ab x": [1, 2, 7]}
    scorer = ChoiceScorer(model, model.new_cache(), lambda text: encode[text], None)
    assert scorer.score("ab", [" cd", " x"]) == pytest.approx([-math.log(300)] * 2)
    with pytest.raises(InputError, match="no token"):
        scorer.score("ab", [" c", " x"])


def test_what_cannot_be_scored() -> None:
    """An empty question and one that does not fit are clear errors."""
    model = FakeDecoder(300, 16)
    scorer = ChoiceScorer(model, model.new_cache(), lambda text: list(text.encode()), None)
    with pytest.raises(InputError, match="at least one token"):
        scorer.score("", ["a", "b"])
    with pytest.raises(ContextOverflowError, match="16"):
        scorer.score("q" * 20, ["a", "b"])


_GENERATED = {
    # asked → (what the model writes, row, right)
    "colour": (
        "<think>\nA is a number. C is a verb.\n</think>\n\nB",
        Question(1, "Which is a colour?", "", "choice", ("seven", "red", "run"), 1),
        True,
    ),
    "France": (
        "Easy.\n</think>\n\nParis",
        Question(2, "Capital of France?", "", "exact", expected="Paris"),
        True,
    ),
    "cat": (
        "<think>A spider has 8, a cat 4",
        Question(3, "How many legs has a cat?", "", "number", expected="4"),
        False,
    ),
    "dog": (
        "<think>A cat has 4.</think>Here it is 3.",
        Question(4, "How many legs has a dog?", "", "number", expected="4"),
        False,
    ),
}


def _reply_of(text: str) -> bytes:
    return HEAD + event(text) + event(None, "stop") + b"data: [DONE]\n\n"


@pytest.mark.parametrize("mode", ["local", "cloud"])
def test_the_answer_after_the_thinking_is_judged(mode: str) -> None:
    """Of what a model generates the text without its thinking; one that never closes is no answer."""

    texts = {key: text for key, (text, _, _) in _GENERATED.items()}

    def reply(head: bytes, body: bytes) -> bytes:
        return _reply_of(next(text for key, text in texts.items() if key.encode() in body))

    preprocessor = Preprocessor(None, None, clock=time.perf_counter)
    questions = [question for _, question, _ in _GENERATED.values()]
    with (
        scripted_cloud(reply) as server,
        Reasoner(
            Device.of(scripted_model(texts), preprocessor),
            connect(CloudOptions(server.url, model="m")),
            mode=mode,
        ) as reasoner,
    ):
        steps: list[int] = []
        results = ask_questions(reasoner, questions, SamplingParams(max_tokens=99), lambda: steps.append(1))
    assert [result.correct for result in results] == [right for _, _, right in _GENERATED.values()]
    assert len(steps) == len(questions) and {result.source for result in results} == {mode}


def test_summary() -> None:
    """Means, standard errors, groups, escalation and money."""
    results = [
        Result("choice", "local", True, False),
        Result("choice", "local", False, True),
        Result("number", "cloud", True, None, 0.25),
        Result("exact", "degraded", True, None, 0.0),
    ]
    figures = summarize(results)
    assert (figures["n"], figures["accuracy"], figures["metric"]) == (4, 0.75, "mixed")
    assert figures["stderr"] == pytest.approx(np.std([1, 0, 1, 1], ddof=1) / 2)
    assert (figures["acc"], figures["acc_norm"], figures["escalated_share"], figures["usd"]) == (
        0.5,
        0.5,
        0.25,
        0.25,
    )
    assert {name: part["n"] for name, part in figures["by_source"].items()} == {
        "cloud": 1,
        "degraded": 1,
        "local": 2,
    }
    assert summarize([Result("exact", "cloud", True, None, None)])["usd"] is None
