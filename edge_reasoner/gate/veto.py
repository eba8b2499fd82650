"""Hard rules, applied before any estimate: what must stay, what cannot be answered here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_reasoner.gate.policy import Mode, Policy


@dataclass(frozen=True)
class Vetoes:
    """Why a place is excluded; an empty tuple means it is allowed."""

    against_local: tuple[str, ...]
    against_cloud: tuple[str, ...]
    #: the subset of `against_cloud` that is the owner's rule (privacy, local_only, size), not circumstance
    forbidden: tuple[str, ...]


def vetoes(
    request: Mapping[str, Any],
    *,
    prompt_tokens: int,
    context_tokens: int | None,
    policy: Policy,
    mode: Mode,
    has_cloud: bool,
    local_problem: str | None = None,
) -> Vetoes:
    """Which places are excluded for a prompt.

    `request` is everything that could be sent, by the names that it would have there; `prompt_tokens` the
    prompt's length as the local model sees it, template included; `context_tokens` the local limit, of which
    one token must be left for an answer; None where the
    local model is not asked.
    `local_problem`: why the local model cannot read the prompt, if it cannot.
    """
    against_local: list[str] = []
    if context_tokens is not None and prompt_tokens + 1 > context_tokens:
        against_local.append(
            f"the prompt's {prompt_tokens} tokens do not fit the local context of {context_tokens} tokens"
        )
    if local_problem is not None:
        against_local.append(f"the local model cannot read the prompt: {local_problem}")
    if mode == "cloud":
        against_local.append("mode is cloud")
    forbidden = policy.screen.reasons(request)
    circumstance: list[str] = []
    if mode in ("local", "offline"):
        circumstance.append(f"mode is {mode}")
    elif not has_cloud:
        circumstance.append("no cloud is configured")
    return Vetoes(tuple(against_local), (*forbidden, *circumstance), forbidden)
