"""The gate: pure, explained, and in the right direction."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_reasoner.errors import InputError
from edge_reasoner.gate.decide import AnswerStats, decide_after, decide_before, forced
from edge_reasoner.gate.policy import Policy, check_mode
from edge_reasoner.gate.veto import vetoes
from edge_reasoner.preprocess.features import extract

POLICY = Policy()
EASY = extract("What is the capital of France?")
SURE = AnswerStats.of([-0.05] * 10, [0.95] * 10, [0.1] * 10, "stop")
UNSURE = AnswerStats.of([-2.5] * 10, [0.1] * 10, [4.0] * 10, "stop")


@pytest.mark.parametrize(
    "harder",
    [
        "Prove step by step why the sum of 3 primes like 5, 7 and 11 is odd if each is odd, then generalize.",
        "Write a Python function that parses JSON and explain why it is correct.",
        "Объясни, почему небо голубое и как это связано с рассеянием света?",
        "Translate the poem into Chinese and compare it with the original.",
    ],
)
def test_harder_prompts_score_lower(harder: str) -> None:
    """Harder prompts score below a plain question, with a reason beyond the number."""
    decision = decide_before(extract(harder), POLICY)
    assert decision.score < decide_before(EASY, POLICY).score - 0.1
    assert decision.calibrated is False and "uncalibrated" in decision.reasons[0]


def test_answer_statistics_decide() -> None:
    """The same prompt: a sure answer stays, an unsure or an empty one goes; reasons name the cause."""
    assert decide_after(SURE, EASY, POLICY).route == "local"
    unsure = decide_after(UNSURE, EASY, POLICY)
    assert unsure.route == "cloud" and any("unsure" in reason for reason in unsure.reasons)
    empty = decide_after(AnswerStats.of([], [], [], "stop"), EASY, POLICY)
    assert empty.route == "cloud" and "empty" in " ".join(empty.reasons)


@given(
    a=st.lists(st.floats(-12, 0), min_size=1, max_size=40),
    threshold=st.floats(0, 1),
    finish=st.sampled_from([None, "stop", "length", "context"]),
)
def test_decisions_are_consistent(a: list[float], threshold: float, finish: str | None) -> None:
    """Score within 0…1, route as the threshold says, JSON-ready, and the same every time."""
    stats = AnswerStats.of(a, [0.5] * len(a), [1.0] * len(a), finish)
    policy = Policy(threshold=threshold)
    decision = decide_after(stats, EASY, policy)
    assert 0 <= decision.score <= 1
    assert decision.route == ("local" if decision.score >= threshold else "cloud")
    assert decision == decide_after(stats, EASY, policy)
    assert json.loads(json.dumps(decision.as_dict()))["features"]["answer_tokens"] == len(a)


@given(low=st.floats(-6, 0), high=st.floats(-6, 0))
def test_surer_tokens_never_score_lower(low: float, high: float) -> None:
    """All else equal, higher log-probabilities never lower the score."""
    low, high = min(low, high), max(low, high)
    scores = [
        decide_after(AnswerStats.of([p] * 9, [0.5] * 9, [1.0] * 9, "stop"), EASY, POLICY).score
        for p in (low, high)
    ]
    assert scores[0] <= scores[1] + 1e-12


def test_loops_and_fluent_maths_are_not_trusted() -> None:
    """Sure words do not save an answer that repeats itself, nor a maths answer as much as a plain one."""
    loop = AnswerStats.of([-0.05] * 40, [0.95] * 40, [0.1] * 40, "length", [1, 2, 3, 4] * 10)
    assert loop.repetition > 0.8
    decision = decide_after(loop, EASY, POLICY)
    assert decision.route == "cloud" and "the answer repeats itself" in decision.reasons
    maths = extract("What is 17 * 23?")
    assert decide_after(SURE, maths, POLICY).score < decide_after(SURE, EASY, POLICY).score - 0.2


def _vetoes(text: str = "hello", **changes):
    options = {
        "prompt_tokens": 10,
        "context_tokens": 100,
        "policy": POLICY,
        "mode": "auto",
        "has_cloud": True,
    }
    request = {"messages": [{"role": "user", "content": text}]}
    return vetoes(request, **{**options, **changes})


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("write to ann.lee+x@example.co.uk", "e-mail address"),
        ("card 4111 1111 1111 1111", "payment card"),
        ("IBAN DE89 3704 0044 0532 0130 00", "IBAN"),
        ("-----BEGIN RSA PRIVATE KEY-----", "secret key"),
        ("sk-abcdefghijklmnop1234", "secret key"),
        ("my password is hunter2", "password"),
    ],
)
def test_private_patterns(text: str, name: str) -> None:
    """Each default pattern keeps its example at home; an ordinary prompt is free."""
    assert any(name in reason for reason in _vetoes(text).forbidden)
    assert not _vetoes("How many litres are 1,000,000 ml? Who wrote Faust?").forbidden


def test_vetoes() -> None:
    """Context, policy, modes and a missing cloud each exclude their place, with words."""
    assert not _vetoes().against_local and not _vetoes().against_cloud
    assert not _vetoes(prompt_tokens=99).against_local
    assert "do not fit" in _vetoes(prompt_tokens=100).against_local[0]
    assert _vetoes(policy=Policy(local_only=True)).forbidden
    assert _vetoes(policy=Policy(max_cloud_prompt_chars=3)).forbidden
    for changes in ({"mode": "local"}, {"mode": "offline"}, {"has_cloud": False}):
        got = _vetoes(**changes)
        assert got.against_cloud and not got.forbidden


@pytest.mark.parametrize(
    "options",
    [
        {"threshold": 1.5},
        {"threshold_before": -1},
        {"early_tokens": 0},
        {"private_patterns": {"x": "("}},
        {"max_cloud_prompt_chars": -1},
        {"threshold": "high"},
        {"threshold_before": None},
        {"early_tokens": 2.5},
        {"private_patterns": {"x": 3}},
        {"max_cloud_prompt_chars": "many"},
    ],
)
def test_illegal_policies_are_refused(options: dict) -> None:
    """Each illegal value is refused at construction."""
    with pytest.raises(InputError, match="policy"):
        Policy(**options)


def test_modes_and_forced() -> None:
    """Unknown modes are refused; a veto keeps the score and comes first among the reasons."""
    with pytest.raises(InputError, match="auto, local, cloud, offline"):
        check_mode("AUTO")
    basis = decide_before(EASY, POLICY)
    got = forced("cloud", ("because",), basis)
    assert (got.route, got.score, got.reasons[0]) == ("cloud", basis.score, "because")
