"""Token choice against transformers' logits processors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.engine.sampling import choose, filtered
from edge_reasoner.errors import BackendError, InputError

VOCAB = 3000


def _logits(seed: int, scale: float = 4.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(VOCAB) * scale).astype(np.float32)


@pytest.mark.parametrize("scale", [0.01, 1.0, 6.0])
@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"temperature": 1.3, "top_k": 40},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 1.0, "top_p": 0.0},
        {"temperature": 2.0, "min_p": 0.05},
        {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.02},
        {"temperature": 1.0, "top_k": VOCAB, "top_p": 0.9999},
    ],
)
def test_distribution_as_transformers(params: dict, scale: float) -> None:
    """The candidate probabilities equal those of transformers' warpers in its order."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = _logits(3, scale)
    scores = transformers.TemperatureLogitsWarper(params["temperature"])(None, torch.from_numpy(logits)[None])
    if "top_k" in params:
        scores = transformers.TopKLogitsWarper(params["top_k"])(None, scores)
    if "top_p" in params:
        scores = transformers.TopPLogitsWarper(params["top_p"])(None, scores)
    if "min_p" in params:
        scores = transformers.MinPLogitsWarper(params["min_p"])(None, scores)
    expected = torch.softmax(scores.double(), -1)[0].numpy()
    got = np.zeros(VOCAB)
    ids, probabilities = filtered(logits, SamplingParams(**params))
    got[ids] = probabilities
    # float32 cumulative sums may put one border token on the other side
    assert np.abs(got - expected).sum() < 2e-3


def test_repetition_penalty_as_transformers() -> None:
    """The penalized greedy choice equals transformers'."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for seed in range(20):
        logits = _logits(seed)
        previous = np.argsort(-logits)[:5].tolist()
        scores = transformers.RepetitionPenaltyLogitsProcessor(1.8)(
            torch.tensor([previous]), torch.from_numpy(logits.copy())[None]
        )
        choice = choose(logits, SamplingParams(repetition_penalty=1.8), np.random.default_rng(0), previous)
        assert choice.token_id == int(scores.argmax())


def test_frequencies_follow_the_distribution() -> None:
    """20,000 draws are within 5 standard errors of the stated probabilities."""
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))
    rng, params = np.random.default_rng(7), SamplingParams(temperature=1.0)
    counts = np.bincount([choose(logits, params, rng).token_id for _ in range(20_000)], minlength=4)
    expected = np.exp(logits.astype(np.float64))
    error = np.sqrt(expected * (1 - expected) / 20_000)
    assert np.all(np.abs(counts / 20_000 - expected) < 5 * error)


@given(seed=st.integers(0, 10_000), scale=st.floats(0.01, 30))
def test_statistics(seed: int, scale: float) -> None:
    """logprob, margin and entropy equal a float64 log-softmax of the untouched logits."""
    logits = _logits(seed, scale)
    choice = choose(logits, SamplingParams(temperature=1.7, top_k=5, seed=1), np.random.default_rng(seed))
    exact = logits.astype(np.float64)
    exact = exact - exact.max() - math.log(np.exp(exact - exact.max()).sum())
    probabilities = np.exp(exact)
    top = np.sort(probabilities)[-2:]
    assert choice.logprob == pytest.approx(exact[choice.token_id], abs=1e-4)
    assert choice.margin == pytest.approx(top[1] - top[0], abs=1e-5)
    assert choice.entropy == pytest.approx(-(probabilities * exact).sum(), abs=1e-3, rel=1e-3)


def test_greedy_and_seed() -> None:
    """Temperature 0 takes the argmax; the same seed draws the same tokens, another seed others."""
    logits = _logits(1, 1.0)
    assert choose(logits, SamplingParams(), np.random.default_rng(0)).token_id == int(logits.argmax())
    params = SamplingParams(temperature=1.0)
    draws = [
        [choose(logits, params, rng).token_id for _ in range(20)]
        for rng in (np.random.default_rng(5), np.random.default_rng(5), np.random.default_rng(6))
    ]
    assert draws[0] == draws[1] != draws[2]


def test_masked_tokens_are_never_drawn() -> None:
    """−inf logits are legal, have no effect on the entropy and are never drawn."""
    logits = np.full(10, -np.inf, np.float32)
    logits[[2, 5]] = 1.0
    choices = [choose(logits, SamplingParams(temperature=5.0), np.random.default_rng(s)) for s in range(50)]
    assert {c.token_id for c in choices} == {2, 5}
    assert choices[0].entropy == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_an_error(bad: float) -> None:
    """NaN or +inf logits are a BackendError, not a random token."""
    logits = _logits(0)
    logits[7] = bad
    with pytest.raises(BackendError, match="not finite"):
        choose(logits, SamplingParams(), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("top_k", -1),
        ("top_k", 1.5),
        ("max_tokens", 0),
        ("seed", -1),
        ("stop", ["a"]),
        ("stop", ("",)),
        ("stop", ("x",) * 17),
        ("repetition_penalty", 0),
    ],
)
def test_illegal_parameters_are_refused(field: str, value: object) -> None:
    """Each illegal value is refused at construction, naming the field."""
    with pytest.raises(InputError, match=field):
        SamplingParams(**{field: value})
