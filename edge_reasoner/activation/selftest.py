"""The activation self-test: which candidate reproduces the golden vectors, and which is fastest.

A kernel is not trusted before it has been checked on this machine: int4 MatMulNBits at accuracy level 4,
with several tokens at once, gives a wrong argmax through KleidiAI under an emulated Cortex-A76, while the
same graph agrees with `mlas.disable_kleidiai=1`. So every candidate must reproduce the logits that the
exporter computed with torch, for a prefill of several tokens and token by token; the fastest that does is
taken. Candidates marked `reference` (slow arithmetic) are tried only if no other passes. One is tried at a
time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from edge_reasoner.activation.choice import Candidate, CandidateReport
from edge_reasoner.backends.golden import Trial
from edge_reasoner.errors import BackendError, BundleError, VerificationError

#: A later candidate must need less than this share of the best time so far, or noise would decide.
_WORTHWHILE = 0.97


@dataclass(frozen=True)
class Outcome:
    """The winner, and a report for every candidate that was tried."""

    candidate: Candidate
    reports: tuple[CandidateReport, ...]


def choose(candidates: Sequence[Candidate], run_trial: Callable[[Candidate], Trial]) -> Outcome:
    """The fastest candidate that passes its trial; reference candidates only if no other does.

    Raises VerificationError, naming each candidate's problem, when none passes.
    """
    reports: list[CandidateReport] = []
    for reference in (False, True):
        best: tuple[float, Candidate] | None = None
        for candidate in candidates:
            if candidate.reference is not reference:
                continue
            reports.append(report := _try(candidate, run_trial))
            if report.step_ms is not None and (best is None or report.step_ms < best[0] * _WORTHWHILE):
                best = report.step_ms, candidate
        if best is not None:
            return Outcome(best[1], tuple(reports))
    tried = "; ".join(f"{r.variant_id} {_options_text(r.session_options)}: {r.reason}" for r in reports)
    raise VerificationError(
        f"no variant reproduces the golden vectors on this machine: {tried or 'no usable variant'}"
    )


def _options_text(options: Mapping[str, str]) -> str:
    return (
        f"({', '.join(f'{key}={value}' for key, value in sorted(options.items()))})" if options else "(as is)"
    )


def _try(candidate: Candidate, run_trial: Callable[[Candidate], Trial]) -> CandidateReport:
    try:
        trial = run_trial(candidate)
    except (BackendError, BundleError) as error:
        return CandidateReport(
            variant_id=candidate.variant_id,
            session_options=candidate.session_options,
            passed=False,
            reason=str(error),
        )
    return CandidateReport(
        variant_id=candidate.variant_id,
        session_options=candidate.session_options,
        passed=not trial.problem,
        reason=trial.problem or "reproduces the golden vectors",
        error=trial.error if math.isfinite(trial.error) else None,
        step_ms=trial.step_ms,
    )
