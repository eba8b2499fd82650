"""The first look at a query: features, embedding, length in tokens, and what is excluded. Values only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_reasoner.chat.messages import THINKING_FIELDS, message_text
from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.errors import InputError
from edge_reasoner.gate.decide import Decision, decide_before
from edge_reasoner.gate.policy import Mode, Policy
from edge_reasoner.gate.veto import Vetoes, vetoes
from edge_reasoner.preprocess.features import PromptFeatures
from edge_reasoner.preprocess.preprocessor import Preprocessor
from edge_reasoner.query.device import Device


@dataclass(frozen=True)
class Query:
    """What was asked, and who may answer. `streaming`: pieces are shown as they come."""

    request: ChatRequest
    mode: Mode
    streaming: bool


@dataclass(frozen=True)
class Inspected:
    """A query after the first look.

    `prompt_ids`: the chat as the local model sees it; empty where the local model is not asked or cannot take
    it. `local_error` says why it cannot (its chat template or tokenizer refused the messages).
    """

    query: Query
    features: PromptFeatures
    #: float32 [dimension], L2-normalized; None without an encoder
    embedding: NDArray[np.float32] | None
    prompt_ids: tuple[int, ...]
    veto: Vetoes
    before: Decision
    preprocess_ms: float
    local_error: InputError | None


def inspect(
    query: Query, device: Device, policy: Policy, *, has_cloud: bool, clock: Callable[[], float]
) -> Inspected:
    """Looks at a query. Raises InputError for messages without text, and what opening the device raises.

    Mode "cloud" asks nothing of the device: neither tokenizer, template nor encoder are tried then, and its
    context is no limit. The owner's vetoes look at the request alone and hold in every mode.
    """
    messages = query.request.messages
    prompt_ids: tuple[int, ...] = ()
    local_error: InputError | None = None
    context_tokens: int | None = None
    preprocessor = Preprocessor(None, None, clock=clock)
    if query.mode != "cloud":
        parts = device.parts
        preprocessor, limit = parts.preprocessor, parts.model.context_tokens
        context_tokens = min(query.request.context_tokens or limit, limit)
        try:
            prompt_ids = tuple(parts.model.prompt_ids(messages))
        except InputError as error:
            # the device's trouble: the cloud may still answer
            local_error = error
    looked = preprocessor.run(message_text(messages[-1]))
    veto = vetoes(
        _sendable(query.request),
        prompt_tokens=len(prompt_ids),
        context_tokens=context_tokens,
        local_problem=None if local_error is None else str(local_error),
        policy=policy,
        mode=query.mode,
        has_cloud=has_cloud,
    )
    return Inspected(
        query=query,
        features=looked.features,
        embedding=looked.embedding,
        prompt_ids=prompt_ids,
        veto=veto,
        before=decide_before(looked.features, policy),
        preprocess_ms=looked.preprocess_ms,
        local_error=local_error,
    )


def _sendable(request: ChatRequest) -> dict[str, Any]:
    """All of a request that a cloud could be given, whether a protocol sends it or not; never thinking."""
    messages = [
        {name: value for name, value in message.items() if name not in THINKING_FIELDS}
        for message in request.messages
    ]
    return {"messages": messages, "stop": request.params.stop}
