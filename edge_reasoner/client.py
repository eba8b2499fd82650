"""`InferenceClient`: one call against a bundle on this device, a local service or any OpenAI endpoint.

client = InferenceClient(api_key=None, model_name="demo", endpoint="bundle/")
reply = client.infer(prompt="…", parameters={"temperature": 0.2, "max_tokens": 64, "attention_window": 512})
print(reply.choices[0].text)
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_reasoner.chat.checks import check_integer, check_is, check_text
from edge_reasoner.chat.messages import as_messages
from edge_reasoner.chat.model import ChatModel, ChatRequest, Usage
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.cloud import connect
from edge_reasoner.cloud.base import CloudOptions
from edge_reasoner.errors import InputError
from edge_reasoner.files import exists
from edge_reasoner.gate.policy import Policy
from edge_reasoner.reasoner import Reasoner, sampling_params

#: `parameters` that `infer` takes: the sampling parameters, and `attention_window`
_WINDOW = "attention_window"
_KEY_NAME = "api_key"


@dataclass(frozen=True)
class InferenceChoice:
    """One answer. `thinking`: what a reasoning model wrote before it, or None."""

    text: str
    finish_reason: str
    index: int = 0
    thinking: str | None = None


@dataclass(frozen=True)
class InferenceResult:
    """What `infer` returns. `source` is "local" or "cloud"; `usage` is None where nobody counted."""

    choices: tuple[InferenceChoice, ...]
    model: str
    source: str
    usage: Usage | None


class InferenceClient:
    """A client for one model, wherever it runs. Thread-safe. Opens a bundle on the first call."""

    def __init__(
        self,
        api_key: str | None = None,
        model_name: str | None = None,
        endpoint: str | os.PathLike[str] | None = None,
        *,
        policy: Policy | None = None,
    ) -> None:
        """`endpoint` is a URL (http://…/v1) or a bundle (a directory or a `.tar`); without
        it, `model_name` is that path.

        `api_key` None takes OPENAI_API_KEY from the environment; neither is used for a bundle. `policy`: the
        rules for what a URL is sent (default: `Policy()`); what they forbid is a PrivacyVetoError. Raises
        InputError.
        """
        self._lock = threading.Lock()
        self._reasoner: Reasoner | None = None
        self._cloud: ChatModel | None = None
        self._bundle: Path | None = None
        self._policy = policy
        place = endpoint if endpoint is not None else model_name
        if place is None:
            raise InputError("InferenceClient: give an endpoint (a URL or a bundle) or a model_name")
        check_is(
            "model_name" if endpoint is None else "endpoint",
            place,
            (str, os.PathLike),
            "a URL (http://…/v1) or a bundle's path",
        )
        if api_key is not None:
            check_text("api_key", api_key)
        if isinstance(place, str) and "://" in place:
            environment = os.environ if api_key is None else {**os.environ, _KEY_NAME: api_key}
            key_env = "OPENAI_API_KEY" if api_key is None else _KEY_NAME
            rules = (policy or Policy()).screen
            self._cloud = connect(CloudOptions(place, model_name, key_env, environment, screen=rules))
        elif exists(Path(place)):
            self._bundle = Path(place)
        else:
            raise InputError(
                f"InferenceClient: {str(place)!r} is neither a URL (http://…/v1) nor a bundle"
                " (a directory or a .tar)"
            )

    def infer(self, prompt: str, parameters: Mapping[str, Any] | None = None) -> InferenceResult:
        """Answers a prompt.

        `parameters`: any of `SamplingParams`' fields, and `attention_window`: the most tokens, prompt and
        answer together, that the model attends to. A bundle enforces it as a context limit (a longer prompt
        is refused, an answer ends there with reason "context"); an endpoint gets it as a request field of
        that name, and may ignore or refuse it. Raises InputError (unknown parameters are named, with those
        allowed), PrivacyVetoError (a URL is not sent what the policy forbids), ContextOverflowError,
        CloudError.
        """
        check_is("parameters", parameters, (Mapping, type(None)), "a mapping of parameters")
        given = dict(parameters or {})
        window = given.pop(_WINDOW, None)
        if window is not None:
            check_integer(_WINDOW, window, 1)
        try:
            params = sampling_params(None, given)
        except InputError as error:
            hint = f", {_WINDOW}" if "unknown parameter" in str(error) else ""
            raise InputError(f"{error}{hint}") from error
        if self._cloud is not None:
            return _infer_remote(self._cloud, prompt, params, window)
        answer = self._open().ask(prompt, params=params, context_tokens=window)
        choice = InferenceChoice(answer.text, answer.finish_reason, thinking=answer.thinking)
        return InferenceResult((choice,), answer.model, "local", answer.usage)

    def close(self) -> None:
        """Releases the bundle's session or the connections."""
        with self._lock:
            if self._reasoner is not None:
                self._reasoner.close()
                self._reasoner = None
        if self._cloud is not None:
            self._cloud.close()

    def __enter__(self) -> InferenceClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> Reasoner:
        with self._lock:
            if self._reasoner is None:
                assert self._bundle is not None, "without an endpoint there is a bundle"
                self._reasoner = Reasoner.open(self._bundle, mode="local", policy=self._policy)
            return self._reasoner


def _infer_remote(
    cloud: ChatModel, prompt: str, params: SamplingParams, window: int | None
) -> InferenceResult:
    extra = {} if window is None else {_WINDOW: window}
    result = cloud.submit(ChatRequest(tuple(as_messages(prompt)), params=params, extra=extra)).result()
    choice = InferenceChoice(result.text, result.finish_reason, thinking=result.thinking)
    return InferenceResult((choice,), result.model, "cloud", result.usage)
