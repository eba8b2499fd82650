"""The activation self-test: which candidate reproduces the golden vectors, and which is fastest.

A kernel is not trusted before it has been checked on this machine: int4 MatMulNBits at accuracy level 4,
with several tokens at once, gives a wrong argmax through KleidiAI under an emulated Cortex-A76, while the
same graph agrees with `mlas.disable_kleidiai=1`. So every candidate must reproduce the logits that the
exporter computed with torch, for a prefill of several tokens and token by token; the fastest that does is
taken. Candidates marked `reference` (slow arithmetic) are tried only if no other passes. One model is open
at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from edge_reasoner.activation.choice import Candidate, CandidateReport
from edge_reasoner.backends.golden import Trial
from edge_reasoner.errors import BackendError, BundleError, VerificationError

#: A later candidate must need less than this share of the best time so far, or noise would decide.
_WORTHWHILE = 0.97


class _Closable(Protocol):
    def close(self) -> None: ...


S = TypeVar("S", bound=_Closable)


@dataclass(frozen=True)
class Outcome(Generic[S]):
    """The winner with its model still open, and a report for every candidate that was tried."""

    model: S
    candidate: Candidate
    reports: tuple[CandidateReport, ...]


def choose(
    candidates: Sequence[Candidate],
    open_candidate: Callable[[Candidate], S],
    run_trial: Callable[[S], Trial],
) -> Outcome[S]:
    """The fastest candidate that passes its trial; reference candidates only if no other does.

    Raises VerificationError, naming each candidate's problem, when none passes.
    """
    reports: list[CandidateReport] = []
    for reference in (False, True):
        group = [candidate for candidate in candidates if candidate.reference is reference]
        if (winner := _fastest(group, open_candidate, run_trial, reports)) is not None:
            model, candidate = winner
            return Outcome(model, candidate, tuple(reports))
    tried = "; ".join(f"{r.variant_id} {_options_text(r.session_options)}: {r.reason}" for r in reports)
    raise VerificationError(
        f"no variant reproduces the golden vectors on this machine: {tried or 'no usable variant'}"
    )


def _options_text(options: Mapping[str, str]) -> str:
    return (
        f"({', '.join(f'{key}={value}' for key, value in sorted(options.items()))})" if options else "(as is)"
    )


def _fastest(
    group: Sequence[Candidate],
    open_candidate: Callable[[Candidate], S],
    run_trial: Callable[[S], Trial],
    reports: list[CandidateReport],
) -> tuple[S, Candidate] | None:
    """Tries a group, appending to `reports`; at most one model is open at a time, to bound the memory."""
    best: tuple[float, Candidate] | None = None
    held: tuple[S, Candidate] | None = None
    for candidate in group:
        if held is not None:
            held[0].close()
        model, report = _try(candidate, open_candidate, run_trial)
        held = None if model is None else (model, candidate)
        reports.append(report)
        if report.step_ms is not None and (best is None or report.step_ms < best[0] * _WORTHWHILE):
            best = report.step_ms, candidate
    if held is not None and best is not None and held[1] is best[1]:
        return held
    if held is not None:
        held[0].close()
    return None if best is None else (open_candidate(best[1]), best[1])


def _try(
    candidate: Candidate, open_candidate: Callable[[Candidate], S], run_trial: Callable[[S], Trial]
) -> tuple[S | None, CandidateReport]:
    """One candidate's report, and its model if it opened."""
    model: S | None = None
    try:
        model = open_candidate(candidate)
        trial = run_trial(model)
    except (BackendError, BundleError) as error:
        return model, CandidateReport(
            variant_id=candidate.variant_id,
            session_options=candidate.session_options,
            passed=False,
            reason=str(error),
        )
    return model, CandidateReport(
        variant_id=candidate.variant_id,
        session_options=candidate.session_options,
        passed=not trial.problem,
        reason=trial.problem or "reproduces the golden vectors",
        error=trial.error if math.isfinite(trial.error) else None,
        step_ms=trial.step_ms,
    )
