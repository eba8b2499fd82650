"""What there is to choose from: variants that can run here, with the session options worth trying."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

import msgspec

from edge_reasoner.backends.base import Backend
from edge_reasoner.contract.bundle.manifest import Variant
from edge_reasoner.errors import BundleError

#: Tried besides what a bundle asks for, where the architecture has known wrong or slow kernels.
_GENERIC_OPTIONS: Mapping[str, tuple[Mapping[str, str], ...]] = {
    "aarch64": ({"mlas.disable_kleidiai": "1"},),
    "arm64": ({"mlas.disable_kleidiai": "1"},),
}
#: The same weights with fp32 arithmetic, for a bundle without a reference variant that passes. Only
#: onnxruntime's x86 kernels heed it (tried with 1.31.1): an ARM bundle needs a reference variant of its own.
_LAST_RESORT_OPTIONS: Mapping[str, tuple[Mapping[str, str], ...]] = {
    "x86_64": ({"mlas.qnbit.force_fp32": "1"},),
    "AMD64": ({"mlas.qnbit.force_fp32": "1"},),
}


class Candidate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One variant of the manifest with one set of session options: what is tried, and taken, as a whole."""

    variant_id: str
    session_options: dict[str, str]
    reference: bool = False


class CandidateReport(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of one candidate; `error` and `step_ms` as in `Trial`, None where it got not so far."""

    variant_id: str
    session_options: dict[str, str]
    passed: bool
    reason: str
    error: float | None = None
    step_ms: float | None = None


def usable_variants(
    variants: Sequence[Variant], backends: Mapping[str, Backend], isa: Collection[str]
) -> tuple[list[Variant], list[CandidateReport]]:
    """The variants that can run here, and why the others cannot. Raises BundleError."""
    usable, refused = [], []
    for variant in variants:
        if reason := _why_not(variant, backends[variant.backend], isa):
            refused.append(
                CandidateReport(
                    variant_id=variant.id,
                    session_options=variant.session_options,
                    passed=False,
                    reason=reason,
                )
            )
        else:
            usable.append(variant)
    return usable, refused


def _why_not(variant: Variant, backend: Backend, isa: Collection[str]) -> str:
    """Why the variant cannot run here, or ""."""
    if _version(variant.minimum_runtime) > _version(backend.runtime_version):
        return f"needs {backend.name} {variant.minimum_runtime}, {backend.runtime_version} is installed"
    if variant.execution_provider not in backend.providers:
        return f"needs {variant.execution_provider}; installed: {', '.join(backend.providers)}"
    if missing := sorted(set(variant.isa_floor) - set(isa)):
        return f"needs CPU features {', '.join(missing)}"
    return ""


def list_candidates(variants: Sequence[Variant], architecture: str) -> tuple[Candidate, ...]:
    """Every variant as it stands and with the options that the architecture calls for, in their order.

    With an option of last resort, a variant is a reference candidate, like those that the bundle marks.
    """
    generic_options = _GENERIC_OPTIONS.get(architecture, ())
    last_resort_options = _LAST_RESORT_OPTIONS.get(architecture, ())
    plain = [(variant, extra, variant.reference) for variant in variants for extra in ({}, *generic_options)]
    fast = [variant for variant in variants if not variant.reference]
    slow = [(variant, extra, True) for variant in fast for extra in last_resort_options]
    result: list[Candidate] = []
    for variant, extra, reference in (*plain, *slow):
        candidate = Candidate(
            variant_id=variant.id,
            session_options={**variant.session_options, **extra},
            reference=reference,
        )
        if candidate not in result:
            result.append(candidate)
    return tuple(result)


def _version(text: str) -> tuple[int, ...]:
    """Leading numbers of "1.23.2" or "onnxruntime 1.23.2". Raises BundleError."""
    match = re.fullmatch(r"(?:[A-Za-z-]+[ >=]+)?(\d{1,6}(?:\.\d{1,6}){0,3})(?:[.+-]?[A-Za-z].*)?", text)
    if match is None:
        raise BundleError(f"runtime version {text!r} is not like '1.23.2'")
    return tuple(map(int, match[1].split(".")))
