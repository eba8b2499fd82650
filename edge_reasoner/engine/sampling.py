"""Choosing the next token from logits.

The order of the filters is that of transformers: repetition penalty, temperature, top-k, top-p, min-p. What
is *reported* of a token (logprob, margin, entropy) is always of the model's own distribution, before any of
them: the gate reads these, and must not see the user's temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.errors import BackendError

_FIRST_NUCLEUS = 256
#: Tokens e**30 times less likely than the first are left out: together below 3e-8 at a vocabulary of 262 k.
_NEGLIGIBLE_NATS = 30.0
#: exp of it is 0 in float32
_LOWEST_SHIFTED = -1e4


@dataclass(frozen=True)
class Choice:
    """A chosen token and what the model thought at that position (natural logarithms)."""

    token_id: int
    #: log-probability of the chosen token under the unmodified distribution
    logprob: float
    #: probability of the most likely token minus that of the second
    margin: float
    #: entropy of the unmodified distribution, in nats
    entropy: float


class Scratch:
    """Two rows, float32 [vocab], that `choose` writes over: new ones for each token would cost more in page
    faults than all of its arithmetic. For one thread at a time."""

    def __init__(self, vocab_size: int) -> None:
        self.shifted = np.empty(vocab_size, np.float32)
        self.likelihoods = np.empty(vocab_size, np.float32)


def choose(
    logits: NDArray[np.float32],
    params: SamplingParams,
    rng: np.random.Generator,
    previous: Sequence[int] = (),
    scratch: Scratch | None = None,
) -> Choice:
    """Chooses one token from float32 `logits` [vocab], which stay as they are.

    `previous` are the ids that the repetition penalty applies to; `scratch` (of the same vocabulary) is
    overwritten. Raises BackendError when the logits hold no finite maximum. No step sorts the whole
    vocabulary.
    """
    room = scratch or Scratch(len(logits))
    first = int(logits.argmax())
    top = float(logits[first])
    if not math.isfinite(top):
        raise BackendError("the model's logits are not finite")
    with np.errstate(over="ignore"):  # to −inf: as far below as a masked token
        shifted = np.subtract(logits, np.float32(top), out=room.shifted)
    # A masked token (−inf) has probability 0 and must add 0 to Σ p·x, not 0·−inf.
    np.maximum(shifted, np.float32(_LOWEST_SHIFTED), out=shifted)
    likelihoods = np.exp(shifted, out=room.likelihoods)
    total = float(likelihoods.sum(dtype=np.float64))
    log_total = math.log(total)
    margin = (float(likelihoods[first]) - _second(likelihoods, first)) / total
    token = first
    if not params.greedy or (params.repetition_penalty != 1.0 and len(previous)):
        adjusted = _penalized(logits, params.repetition_penalty, previous)
        token = int(adjusted.argmax()) if params.greedy else _draw(adjusted, params, rng)
    logprob = float(shifted[token]) - log_total
    np.multiply(shifted, likelihoods, out=shifted)
    entropy = max(0.0, log_total - float(shifted.sum(dtype=np.float64)) / total)
    return Choice(token, logprob, margin, entropy)


def filtered(
    logits: NDArray[np.float32], params: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Candidate ids [n] and their probabilities [n] after temperature, top-k, top-p and min-p."""
    top = logits.max()
    # at least the first is in: a temperature may be so low that the difference is lost beside the logits
    ids = np.flatnonzero(logits >= top - np.float32(_NEGLIGIBLE_NATS * params.temperature))
    if 0 < params.top_k < len(ids):
        # ties with the k-th stay in, as in transformers
        candidates = logits[ids]
        kth = np.partition(candidates, len(ids) - params.top_k)[len(ids) - params.top_k]
        ids = ids[candidates >= kth]
    with np.errstate(over="ignore"):  # to −inf, whose probability is 0
        scores = (logits[ids].astype(np.float64) - float(top)) / params.temperature
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum()
    if params.top_p < 1.0:
        kept = _nucleus(probabilities, params.top_p)
        ids, probabilities = ids[kept], probabilities[kept]
    if params.min_p > 0.0:
        kept = np.flatnonzero(probabilities >= params.min_p * probabilities.max())
        ids, probabilities = ids[kept], probabilities[kept]
    return ids, probabilities / probabilities.sum()


def _draw(logits: NDArray[np.float32], params: SamplingParams, rng: np.random.Generator) -> int:
    ids, probabilities = filtered(logits, params)
    cumulative = probabilities.cumsum()
    index = int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))
    return int(ids[min(index, len(ids) - 1)])


def _nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    # The smallest set of most likely tokens whose mass reaches top_p; at least one. Looks at the largest few
    # first: a nucleus of more than some hundred tokens is rare.
    size = len(probabilities)
    count = min(_FIRST_NUCLEUS, size)
    while True:
        largest = np.argpartition(probabilities, size - count)[size - count :]
        order = largest[np.argsort(-probabilities[largest], kind="stable")]
        mass_before = probabilities[order].cumsum() - probabilities[order]
        if count == size or mass_before[-1] >= top_p:
            return order[: max(1, int(np.count_nonzero(mass_before < top_p)))]
        count = min(count * 8, size)


def _second(values: NDArray[np.float32], first: int) -> float:
    # the maxima of the parts around the first are cheaper than a partition
    around = (values[:first], values[first + 1 :])
    return max((float(part.max()) for part in around if len(part)), default=0.0)


def _penalized(logits: NDArray[np.float32], penalty: float, previous: Sequence[int]) -> NDArray[np.float32]:
    if penalty == 1.0 or not previous:
        return logits
    seen = np.unique(np.asarray(previous, np.int64))
    adjusted: NDArray[np.float32] = logits.copy()
    values = adjusted[seen]
    with np.errstate(over="ignore"):
        values = np.where(values < 0, values * np.float32(penalty), values / np.float32(penalty))
    adjusted[seen] = np.minimum(values, np.finfo(np.float32).max)
    return adjusted
