"""Runs a component's golden vectors on an open model: how far off is it, and how fast.

The exporter uses it to verify what it made, the device to decide whether a kernel may be trusted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_reasoner.backends.base import DecoderModel, EncoderModel, KVCache
from edge_reasoner.contract.bundle.manifest import (
    DecoderGolden,
    DecoderSpec,
    EncoderGolden,
    EncoderSpec,
    GoldenCheck,
    GoldenSet,
)
from edge_reasoner.errors import BundleError

#: Seconds, monotonic.
Clock = Callable[[], float]

#: The argmax must agree where the expected lead over the runner-up exceeds so many times the permitted RMS
#: error of one logit; a smaller lead is a tie within the tolerance.
_CLEAR_LEADS = 6.0
_WARM_STEPS = 2
_TIMED_STEPS = 8
#: The exporter writes a handful of vectors, 6 steps and at most 1,100 tokens each.
_MAX_VECTORS = 64
_MAX_VECTOR_TOKENS = 4096
_MAX_TOKENS = 16_384
_MAX_DECODE_STEPS = 512
_MAX_KEPT_LOGITS = 1 << 26


@dataclass(frozen=True)
class Trial:
    """Result of the golden vectors on one model.

    `error` is the largest deviation (decoder: relative RMS error of a check's logits; encoder: 1 − cosine;
    inf where a result was not finite), `problem` the first thing wrong ("" = all within tolerance) and
    `step_ms` the median time of one decode step or one embedding, None unless all is within tolerance.
    """

    error: float
    problem: str
    step_ms: float | None


def check_golden(golden: GoldenSet, spec: DecoderSpec | EncoderSpec, where: str) -> None:
    """Raises BundleError unless the vectors can judge a component of that spec."""
    vectors: tuple[DecoderGolden | EncoderGolden, ...]
    vectors, others = golden.decoder, golden.encoder
    kind, other = "decoder", "encoder"
    if isinstance(spec, EncoderSpec):
        vectors, others, kind, other = others, vectors, other, kind
    if others:
        raise BundleError(f"{where}: {other}: vectors of another kind than the component's, {kind}")
    if not 1 <= len(vectors) <= _MAX_VECTORS:
        raise BundleError(f"{where}: {kind}: {len(vectors)} golden vectors; 1 to {_MAX_VECTORS} are needed")
    if not 0 < golden.tolerance <= 1:
        raise BundleError(f"{where}: tolerance is {golden.tolerance}; it must be above 0 and at most 1")
    limit = min(spec.context_tokens, _MAX_VECTOR_TOKENS)
    for vector in vectors:
        if not 1 <= len(vector.token_ids) <= limit:
            raise BundleError(
                f"{where}: token_ids: a vector of {len(vector.token_ids)} tokens; 1 to {limit} are allowed"
            )
        if max(vector.token_ids) >= spec.vocab_size:
            raise BundleError(f"{where}: token_ids: {max(vector.token_ids)} is outside the vocabulary")
        if isinstance(vector, DecoderGolden):
            _check_decoder_vector(vector, spec.vocab_size, where)
        elif isinstance(spec, EncoderSpec) and len(vector.embedding) != spec.dimension:
            raise BundleError(
                f"{where}: an embedding of {len(vector.embedding)} numbers, not {spec.dimension}"
            )
    _check_work(vectors, where)


def _check_work(vectors: Sequence[DecoderGolden | EncoderGolden], where: str) -> None:
    """All vectors together are run for every candidate, on the slowest board."""
    tokens = sum(len(vector.token_ids) for vector in vectors)
    steps = sum(len(v.token_ids) - v.prefill_tokens for v in vectors if isinstance(v, DecoderGolden))
    for what, count, most in (("tokens", tokens, _MAX_TOKENS), ("decode steps", steps, _MAX_DECODE_STEPS)):
        if count > most:
            raise BundleError(f"{where}: golden vectors of {count} {what}; at most {most} are allowed")


def _check_decoder_vector(vector: DecoderGolden, vocab_size: int, where: str) -> None:
    if not vector.checks:
        raise BundleError(f"{where}: checks: a vector has none")
    for check in vector.checks:
        if check.position >= len(vector.token_ids):
            raise BundleError(
                f"{where}: a check at position {check.position} of {len(vector.token_ids)} tokens"
            )
        for name, token in (("token_ids", max(check.token_ids)), ("argmax", check.argmax)):
            if token >= vocab_size:
                raise BundleError(f"{where}: a check's {name}: {token} is outside the vocabulary")
        if not all(map(math.isfinite, check.logits)):
            raise BundleError(f"{where}: a check's logits are not finite")
    if _kept_rows(vector) * vocab_size > _MAX_KEPT_LOGITS:
        raise BundleError(f"{where}: checks so early in the prefill would keep too many logits")


def try_decoder(model: DecoderModel, golden: GoldenSet, clock: Clock) -> Trial:
    """Prefills and steps through every vector, then times decode steps, all on a cache of its own."""
    with closing(model.new_cache(longest_vector_tokens(golden))) as cache:
        error, problem = 0.0, ""
        for vector in golden.decoder:
            cache.rewind(0)
            for check, row in _checked_rows(model, cache, vector):
                deviation, wrong = _compare(check, row, golden.tolerance)
                error, problem = max(error, deviation), problem or wrong
        if problem:
            return Trial(error, problem, None)
        last = np.array(golden.decoder[-1].token_ids[-1:], np.int64)

        def step() -> None:
            cache.rewind(cache.length_tokens - 1)
            model.extend(cache, last)

        return Trial(error, "", _median_ms(step, clock))


def try_encoder(model: EncoderModel, golden: GoldenSet, clock: Clock) -> Trial:
    """Embeds every vector alone and all in one batch, then times one embedding."""
    inputs = [list(vector.token_ids) for vector in golden.encoder]
    expected = np.array([vector.embedding for vector in golden.encoder], np.float64)
    error, problem = 0.0, ""
    for name, got in (
        ("alone", [model.embed([ids])[0] for ids in inputs]),
        ("batched", model.embed(inputs)),
    ):
        for index, (row, wanted) in enumerate(zip(got, expected, strict=True)):
            deviation = _one_minus_cosine(row.astype(np.float64), wanted)
            if deviation > golden.tolerance:
                problem = problem or (
                    f"vector {index}, {name}: 1 − cosine is {deviation:.3g}, above {golden.tolerance:.3g}"
                )
            error = max(error, deviation)
    step_ms = None if problem else _median_ms(lambda: model.embed(inputs[:1]), clock)
    return Trial(error, problem, step_ms)


def longest_vector_tokens(golden: GoldenSet) -> int:
    """The context that the trial of a decoder needs."""
    return max(len(vector.token_ids) for vector in golden.decoder)


def golden_steps(golden: GoldenSet) -> int:
    """How often a trial reads all weights: once for each prefill, embedding and single token."""
    decoder = sum(1 + len(vector.token_ids) - vector.prefill_tokens for vector in golden.decoder)
    return decoder + 2 * len(golden.encoder) + _WARM_STEPS + _TIMED_STEPS


def _kept_rows(vector: DecoderGolden) -> int:
    """Rows of logits that the vector's prefill must return for its checks."""
    inside = [check.position for check in vector.checks if check.position < vector.prefill_tokens]
    return vector.prefill_tokens - min(inside) if inside else 1


def _checked_rows(
    model: DecoderModel, cache: KVCache, vector: DecoderGolden
) -> Iterator[tuple[GoldenCheck, NDArray[np.float32]]]:
    """Each check with the logits [vocab] at its position; a row is valid until the next is asked for."""
    by_position: dict[int, list[GoldenCheck]] = {}
    for check in vector.checks:
        by_position.setdefault(check.position, []).append(check)
    tokens, prefill, kept = np.array(vector.token_ids, np.int64), vector.prefill_tokens, _kept_rows(vector)
    rows = model.extend(cache, tokens[:prefill], kept).logits
    for row, position in enumerate(range(prefill - kept, prefill)):
        for check in by_position.get(position, []):
            yield check, rows[row]
    for position in range(prefill, len(tokens)):
        rows = model.extend(cache, tokens[position : position + 1]).logits
        for check in by_position.get(position, []):
            yield check, rows[0]


def _compare(check: GoldenCheck, row: NDArray[np.float32], tolerance: float) -> tuple[float, str]:
    """Deviation of one check, and what is wrong with it ("" if nothing)."""
    expected = np.array(check.logits, np.float64)
    got = row[list(check.token_ids)].astype(np.float64)
    where = f"position {check.position}"
    if not np.isfinite(row).all():
        return math.inf, f"{where}: logits are not finite"
    centered = expected - expected.mean()
    spread = float(np.linalg.norm(centered)) or float(np.linalg.norm(expected)) or 1.0
    deviation = float(np.linalg.norm(got - expected)) / spread
    if deviation > tolerance:
        return deviation, f"{where}: relative RMS error {deviation:.3g} is above {tolerance:.3g}"
    lead = _expected_lead(check)
    permitted_rms = tolerance * spread / math.sqrt(len(expected))
    if (chosen := int(row.argmax())) != check.argmax and lead > _CLEAR_LEADS * permitted_rms:
        return deviation, f"{where}: token {chosen} leads, not {check.argmax} (expected by {lead:.3g})"
    return deviation, ""


def _expected_lead(check: GoldenCheck) -> float:
    """By how much the expected argmax leads the other listed tokens; 0 where the check does not tell."""
    by_token = dict(zip(check.token_ids, check.logits, strict=True))
    others = [logit for token, logit in by_token.items() if token != check.argmax]
    return by_token[check.argmax] - max(others) if check.argmax in by_token and others else 0.0


def _one_minus_cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return 1 - float(a @ b) / norms if norms > 0 and math.isfinite(norms) else math.inf


def _median_ms(step: Callable[[], object], clock: Clock) -> float:
    for _ in range(_WARM_STEPS):
        step()
    samples_s = []
    for _ in range(_TIMED_STEPS):
        start_s = clock()
        step()
        samples_s.append(clock() - start_s)
    return statistics.median(samples_s) * 1e3
