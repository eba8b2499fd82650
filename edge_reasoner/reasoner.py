"""The `Reasoner`: opens a bundle, connects a cloud, answers. The parts are put together only here."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from edge_reasoner.activation.opening import open_bundle_at
from edge_reasoner.activation.store import Activation
from edge_reasoner.chat.checks import check_integer, check_is, check_number, check_text, refuse
from edge_reasoner.chat.messages import as_messages, message_text, said
from edge_reasoner.chat.model import (
    Cancellation,
    ChatModel,
    ChatRequest,
    ChatResult,
    ChatStream,
    PulledStream,
)
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.cloud import DEFAULT_PROTOCOL, connect
from edge_reasoner.cloud.base import CloudLimits, CloudOptions, CloudPrice
from edge_reasoner.contract.bundle.open import Bundle
from edge_reasoner.contract.template.render import Message
from edge_reasoner.errors import InputError
from edge_reasoner.files import exists
from edge_reasoner.gate.policy import Policy, check_mode
from edge_reasoner.machine.cache_dir import default_cache_dir
from edge_reasoner.query.answer import Answer, Piece
from edge_reasoner.query.assemble import Machine, default_threads, open_device
from edge_reasoner.query.device import Device, DeviceParts
from edge_reasoner.query.inspect import Query
from edge_reasoner.query.routing import Pieces, Router

Prompt = str | Sequence[Message]
#: of a device; more is a slip
_MAX_POWER_W = 1e6


class Reasoner:
    """Answers on this device, and escalates to the cloud where the gate says so. Itself a `ChatModel`.

    Usable from several threads, and with several streams open in one: the device's model serves them in turns
    (`timings.queue_ms`), the cloud side by side. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        device: Device,
        cloud: ChatModel | None = None,
        *,
        mode: str = "auto",
        policy: Policy | None = None,
        price: CloudPrice | None = None,
        power_w: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """From parts, which it closes; most callers want `Reasoner.open`. `cloud` may be another Reasoner."""
        self._mode = check_mode(mode)
        check_is("policy", policy, (Policy, type(None)), "a Policy")
        check_is("price", price, (CloudPrice, type(None)), "a CloudPrice")
        if power_w is not None:
            check_number("power_w", power_w, 0.0, _MAX_POWER_W)
        self._device = device
        self._cloud = cloud
        self._router = Router(
            device, cloud, policy=policy or Policy(), price=price, power_w=power_w, clock=clock
        )

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        cloud: str | ChatModel | None = None,
        *,
        cloud_model: str | None = None,
        protocol: str = DEFAULT_PROTOCOL,
        api_key_env: str | None = "OPENAI_API_KEY",
        cloud_limits: CloudLimits | None = None,
        price: CloudPrice | None = None,
        mode: str = "auto",
        threads: int | None = None,
        context_tokens: int | None = None,
        policy: Policy | None = None,
        power_w: float | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Reasoner:
        """Opens a bundle: a directory, or a `.tar` (unpacked into the cache). `cloud` is the URL of an
        endpoint that speaks `protocol`, or any `ChatModel` (another Reasoner: tiers nest), which is closed
        with this one.

        The first opening on a machine runs the bundle's self-test (seconds to a minute); the choice is kept
        in `cache_dir`. Nothing is sent to the cloud yet. `environment` (default: the process's) holds the API
        key under `api_key_env`. Raises BundleError, TargetError, VerificationError, TemplateError,
        BackendError, InputError.

        With mode "cloud" the bundle only has to exist: it is opened by the first query that names another
        mode, or never, so that whatever is wrong with it stops no query of the cloud.
        """
        environment = os.environ if environment is None else environment
        checked_mode = check_mode(mode)
        _check_count("threads", threads)
        _check_count("context_tokens", context_tokens)
        check_is("bundle", bundle, (str, os.PathLike, Bundle), "the path of a bundle")
        check_is("cache_dir", cache_dir, (str, os.PathLike, type(None)), "a folder's path")
        check_is("environment", environment, Mapping, "a mapping of names to texts")
        check_is("policy", policy, (Policy, type(None)), "a Policy")
        client = None if isinstance(cloud, str) else _as_chat_model(cloud)
        if isinstance(cloud, str):
            limits = CloudLimits() if cloud_limits is None else cloud_limits
            rules = (policy or Policy()).screen
            options = CloudOptions(cloud, cloud_model, api_key_env, environment, limits, price, rules)
            client = connect(options, protocol)
        machine = Machine(
            threads=threads or default_threads(),
            cache_dir=Path(cache_dir) if cache_dir is not None else default_cache_dir(environment),
        )

        def open_parts() -> DeviceParts:
            opened = bundle if isinstance(bundle, Bundle) else open_bundle_at(bundle, machine.cache_dir)
            return open_device(opened, machine, context_tokens=context_tokens, has_cloud=client is not None)

        device = Device(open_parts)
        if checked_mode != "cloud" or not (isinstance(bundle, Bundle) or exists(Path(bundle))):
            _ = device.parts
        return cls(device, client, mode=checked_mode, policy=policy, price=price, power_w=power_w)

    @property
    def activation(self) -> Activation | None:
        """How the local model was chosen; None while it is not open (mode "cloud")."""
        opened = self._device.opened
        return None if opened is None else opened.activation

    @property
    def context_tokens(self) -> int | None:
        """Longest prompt and answer together that the local model takes, in tokens; in mode "cloud" what the
        cloud says."""
        return self._first().context_tokens

    @property
    def name(self) -> str:
        """See `ChatModel`: the local model's name; in mode "cloud" the cloud's."""
        return self._first().name

    def _first(self) -> ChatModel:
        """The model that is asked first."""
        if self._mode == "cloud" and self._cloud is not None:
            return self._cloud
        return self._device.parts.model

    def ask(
        self,
        prompt: Prompt,
        *,
        params: SamplingParams | None = None,
        mode: str | None = None,
        context_tokens: int | None = None,
        **sampling: Any,
    ) -> Answer:
        """Answers a prompt (text, or chat messages).

        Sampling is `params`, or any of its fields by name (`max_tokens=64, temperature=0.7`). Raises
        InputError, ContextOverflowError; CloudError only in mode "cloud": in mode "auto" a cloud that fails
        gives the local answer with source "degraded".
        """
        return self._run(prompt, params, sampling, mode, context_tokens, streaming=False).result()

    def stream(
        self,
        prompt: Prompt,
        *,
        params: SamplingParams | None = None,
        mode: str | None = None,
        context_tokens: int | None = None,
        **sampling: Any,
    ) -> PulledStream[Piece, Answer]:
        """Like `ask`, piece by piece; the last piece is empty and has the whole `Answer`, as `result()` does.

        Nothing is shown before the gate has committed to the local answer, and nothing shown is retracted.
        A piece of kind "handover" (empty) says that the cloud answers; one of kind "degraded" says in its
        text that the cloud broke off and the device starts anew. `Piece.thought` is a reasoning model's
        thinking as it comes. A stream that is
        closed, cancelled or dropped frees the model within a token.
        """
        return self._run(prompt, params, sampling, mode, context_tokens, streaming=True)

    def submit(self, request: ChatRequest) -> ChatStream[str, ChatResult]:
        """See `ChatModel`: routed as `stream` does. A raw text is continued by the local model, ungated.

        `request.extra` is for endpoints and not passed on; hidden states are given for raw texts only.
        """
        if request.text is not None:
            if self._mode == "cloud":
                raise InputError("mode cloud: a raw text can only be continued on the device")
            return self._device.parts.model.submit(request)
        asked = replace(request, messages=tuple(as_messages(request.messages)))
        return self._routed(Query(asked, self._mode, streaming=True))

    def map(
        self,
        prompts: Sequence[Prompt],
        *,
        params: SamplingParams | None = None,
        mode: str | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """Answers many prompts, shortest first (prompts of like length and start share cache and memory).

        Results come in the order of `prompts`.
        """
        if isinstance(prompts, (str, bytes, bytearray)) or not isinstance(prompts, Sequence):
            refuse("prompts", prompts, "a list of prompts")
        answers: dict[int, Answer] = {}
        for index in sorted(range(len(prompts)), key=lambda i: _order(prompts[i])):
            answers[index] = self.ask(prompts[index], params=params, mode=mode, **sampling)
        return [answers[index] for index in range(len(prompts))]

    def session(self, system: str | None = None) -> ChatSession:
        """A conversation. Its turns reuse the KV cache, also where other queries come in between."""
        return ChatSession(self, system)

    def prefill_ahead(self, messages: Sequence[Message]) -> None:
        """Tells that a chat goes on: what its next turn begins with is computed on the device, while nothing
        else is asked. Never waits. Sessions do it by themselves after an answer of the device."""
        opened = self._device.opened
        if opened is not None:
            opened.model.prefill_ahead(tuple(as_messages(messages)))

    def close(self) -> None:
        """Releases model, encoder and connections."""
        self._device.close()
        if self._cloud is not None:
            self._cloud.close()

    def __enter__(self) -> Reasoner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self,
        prompt: Prompt,
        params: SamplingParams | None,
        sampling: Mapping[str, Any],
        mode: str | None,
        context_tokens: int | None,
        *,
        streaming: bool,
    ) -> PulledStream[Piece, Answer]:
        _check_count("context_tokens", context_tokens)
        request = ChatRequest(
            tuple(as_messages(prompt)),
            params=sampling_params(params, sampling),
            context_tokens=context_tokens,
        )
        return self._routed(Query(request, self._mode if mode is None else check_mode(mode), streaming))

    def _routed(self, query: Query) -> PulledStream[Piece, Answer]:
        cancellation = Cancellation()
        return PulledStream(_with_end(self._router.run(query, cancellation)), cancellation)


class ChatSession:
    """Several turns with one model. Not thread-safe; the Reasoner stays open when the session ends."""

    def __init__(self, reasoner: Reasoner, system: str | None = None) -> None:
        """`system`: the conversation's first message, or None."""
        if system is not None:
            check_text("system", system)
        self._reasoner = reasoner
        self._lock = threading.Lock()
        self._messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation so far."""
        return tuple(self._messages)

    def ask(self, prompt: str, **options: Any) -> Answer:
        """One turn; `options` as for `Reasoner.ask`. A turn that fails leaves the conversation as it was."""
        turn = [*self._messages, *as_messages(prompt)]
        return self._keep(turn, self._reasoner.ask(turn, **options))

    def stream(self, prompt: str, **options: Any) -> Iterator[Piece]:
        """One turn, piece by piece; it joins the conversation when its last piece was taken."""
        turn = [*self._messages, *as_messages(prompt)]
        for piece in self._reasoner.stream(turn, **options):
            if piece.answer is not None:
                self._keep(turn, piece.answer)
            yield piece

    def __enter__(self) -> ChatSession:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def _keep(self, turn: list[Message], answer: Answer) -> Answer:
        with self._lock:
            self._messages = [*turn, said(answer.text, answer.thinking)]
        if answer.source != "cloud":
            self._reasoner.prefill_ahead(self._messages)
        return answer


def sampling_params(params: SamplingParams | None, by_name: Mapping[str, Any]) -> SamplingParams:
    """`params`, or parameters by name. Raises InputError: unknown or illegal ones, or both kinds."""
    allowed = [spec.name for spec in fields(SamplingParams)]
    unknown = sorted(set(by_name) - set(allowed))
    if unknown:
        raise InputError(f"unknown parameter {unknown[0]!r}; allowed are {', '.join(allowed)}")
    if params is not None and by_name:
        raise InputError("give either params or single sampling parameters, not both")
    if params is not None:
        check_is("params", params, SamplingParams, "SamplingParams")
        return params
    values = dict(by_name)
    if isinstance(values.get("stop"), str):
        values["stop"] = (values["stop"],)
    elif isinstance(values.get("stop"), list):
        values["stop"] = tuple(values["stop"])
    return SamplingParams(**values)


def _with_end(pieces: Pieces) -> Pieces:
    answer = yield from pieces
    yield Piece("", "end", answer)
    return answer


def _order(prompt: Prompt) -> tuple[int, str]:
    text = "\n".join(message_text(message) for message in as_messages(prompt))
    return len(text), text


def _as_chat_model(cloud: ChatModel | None) -> ChatModel | None:
    if cloud is not None and not callable(getattr(cloud, "submit", None)):
        refuse("cloud", cloud, "an endpoint's URL (http://…/v1) or a model")
    return cloud


def _check_count(name: str, value: int | None) -> None:
    if value is not None:
        check_integer(name, value, 1)
