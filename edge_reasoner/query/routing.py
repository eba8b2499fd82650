"""One query's way: veto → preprocess → gate → local → gate → cloud or degraded. The order stands here only.

A query is a generator of `Piece`s that returns the `Answer`; `PulledStream` makes a stream of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from edge_reasoner.chat.messages import message_text, sent_message
from edge_reasoner.chat.model import Cancellation, ChatModel, ChatRequest, ChatResult, Usage, thought_of
from edge_reasoner.cloud.base import CloudPrice
from edge_reasoner.engine.generate import Generation, TokenPiece
from edge_reasoner.errors import (
    BackendError,
    ContextOverflowError,
    EdgeReasonerError,
    InputError,
    NoAnswerError,
    OverloadedError,
    PrivacyVetoError,
)
from edge_reasoner.gate.decide import AnswerStats, Decision, decide_after, forced
from edge_reasoner.gate.policy import Policy
from edge_reasoner.query.answer import Answer, Cost, Piece, Source
from edge_reasoner.query.device import Device
from edge_reasoner.query.inspect import Inspected, Query, inspect
from edge_reasoner.query.meter import Meter

Pieces = Generator[Piece, None, Answer]

#: the local model's own failures: where nothing was shown yet, the cloud answers
_LOCAL_FAILURES = (BackendError, OverloadedError)
#: where nobody counted and the local tokenizer cannot: characters of a token, about
_CHARS_PER_TOKEN = 4


#: what is said of an answer that ended within its thinking
NO_ANSWER = "thought and gave no answer; allow more tokens"


@dataclass(frozen=True)
class LocalOutcome:
    """How the local attempt ended. `generation` is None if it was given up early for the cloud."""

    generation: Generation | None
    decision: Decision
    hand_over: bool


@dataclass(frozen=True)
class _Way:
    """What the steps of one query share: the first look, what is measured, and the reader's wish to end."""

    looked: Inspected
    meter: Meter
    cancellation: Cancellation

    @property
    def request(self) -> ChatRequest:
        return self.looked.query.request


@dataclass
class _Judged:
    """The local answer's tokens so far, as the gate reads them."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)

    def add(self, piece: TokenPiece) -> bool:
        """Whether the piece was a token of the answer (not of thinking, nor text that was held back)."""
        if piece.thinking:
            # so is all before it
            for taken in (self.token_ids, self.logprobs, self.margins, self.entropies):
                taken.clear()
        if piece.token_id is None or piece.thinking:
            return False
        self.token_ids.append(piece.token_id)
        self.logprobs.append(piece.logprob)
        self.margins.append(piece.margin)
        self.entropies.append(piece.entropy)
        return True

    def stats(self, finish_reason: str | None) -> AnswerStats:
        """The statistics of these tokens."""
        return AnswerStats.of(self.logprobs, self.margins, self.entropies, finish_reason, self.token_ids)


class Router:
    """Answers queries with the parts it is given. Thread-safe; holds no lock."""

    def __init__(
        self,
        device: Device,
        cloud: ChatModel | None,
        *,
        policy: Policy,
        price: CloudPrice | None,
        power_w: float | None,
        clock: Callable[[], float],
    ) -> None:
        """`power_w`: the board's draw under load, for an answer's joules; None: as the bundle predicts."""
        self.policy = policy
        self._device = device
        self._cloud = cloud
        self._price = price
        self._power_w = power_w
        self._clock = clock

    def run(self, query: Query, cancellation: Cancellation) -> Pieces:
        """Answers a chat. Computing starts with the first `next`."""
        meter = Meter(self._clock)
        # 1. Look: features, embedding, length in tokens; what the owner forbids.
        looked = inspect(
            query, self._device, self.policy, has_cloud=self._cloud is not None, clock=self._clock
        )
        meter.preprocess_ms = looked.preprocess_ms
        way = _Way(looked, meter, cancellation)
        # 2. Only one place is possible, or the gate chooses before any token is made.
        if query.mode == "cloud":
            return (yield from self._only_cloud(way))
        if looked.veto.against_cloud:
            return (yield from self._only_local(way))
        if looked.veto.against_local:
            wanted = forced("cloud", looked.veto.against_local, looked.before)
            return (yield from self._cloud_else_local(way, wanted, None))
        if looked.before.route == "cloud":
            return (yield from self._cloud_else_local(way, looked.before, None))
        # 3. The local model tries; the gate judges its first tokens and its whole answer.
        shown: list[str] = []
        try:
            outcome = yield from self._try_local(way, gated=True, shown=shown)
        except _LOCAL_FAILURES as error:
            if any(shown):
                raise
            failed = forced("cloud", (f"the local model failed: {error}",), looked.before)
            yield Piece("", "handover")
            return (yield from self._cloud_else_local(way, failed, None))
        if not outcome.hand_over:
            return self._local_answer(way, outcome, "local", None)
        # 4. Not good enough: the cloud, with what the local model made as the fallback.
        yield Piece("", "handover")
        return (yield from self._cloud_else_local(way, outcome.decision, outcome.generation))

    def _only_cloud(self, way: _Way) -> Pieces:
        forbidden = way.looked.veto.forbidden
        if forbidden:
            raise PrivacyVetoError(f"mode cloud is not allowed for this prompt: {'; '.join(forbidden)}")
        if self._cloud is None:
            raise InputError("mode cloud: no cloud is configured; give the endpoint's URL")
        shown: list[str] = []
        result = yield from self._ask_cloud(way, self._cloud, shown)
        return self._cloud_answer(way, result, forced("cloud", ("mode is cloud",), way.looked.before))

    def _only_local(self, way: _Way) -> Pieces:
        looked, reasons = way.looked, way.looked.veto.against_cloud
        if looked.local_error is not None:
            raise looked.local_error
        if looked.veto.against_local:
            why = "; ".join((*looked.veto.against_local, *reasons))
            raise ContextOverflowError(f"neither the device nor the cloud can take this prompt: {why}")
        outcome = yield from self._try_local(way, gated=False)
        # Offline, an answer that the gate would have handed over says so.
        would = "cloud" in (looked.before.route, outcome.decision.route)
        wanted = looked.query.mode == "offline" and would
        decision = forced("cloud" if wanted else "local", reasons, outcome.decision)
        note = f"{'; '.join(reasons)}: the cloud would have been asked" if wanted else None
        source: Source = "degraded" if wanted else "local"
        return self._local_answer(way, LocalOutcome(outcome.generation, decision, False), source, note)

    def _cloud_else_local(self, way: _Way, decision: Decision, fallback: Generation | None) -> Pieces:
        """The cloud's answer; if the cloud fails, the local one, marked degraded with the reason."""
        assert self._cloud is not None, "vetoes exclude the cloud where none is configured"
        shown: list[str] = []
        try:
            result = yield from self._ask_cloud(way, self._cloud, shown)
        except PrivacyVetoError as error:
            # the owner's rules are no failure: nothing was sent
            if way.looked.veto.against_local:
                raise
            return (yield from self._instead(way, forced("local", (str(error),), decision), fallback))
        except EdgeReasonerError as error:
            # whatever it is (another tier may fail in any way): the device answers itself
            note = f"the cloud failed ({error}); answered on the device"
            if way.looked.veto.against_local:
                why = "; ".join(way.looked.veto.against_local)
                raise ContextOverflowError(f"{why}, and the cloud failed: {error}") from error
        else:
            return self._cloud_answer(way, result, decision)
        spent = self._counted(way, "".join(shown)) if any(shown) else None
        if spent is not None:
            yield Piece(f"\n[{note}]\n", "degraded")
        if fallback is not None:
            way.meter.token()
            yield Piece(fallback.text, "local", thought=fallback.thinking or "")
        else:
            outcome = yield from self._try_local(way, gated=False)
            fallback, decision = outcome.generation, forced("cloud", decision.reasons, outcome.decision)
        return self._local_answer(way, LocalOutcome(fallback, decision, False), "degraded", note, spent)

    def _instead(self, way: _Way, decision: Decision, fallback: Generation | None) -> Pieces:
        """The local answer where the cloud was not allowed after all."""
        if fallback is None:
            outcome = yield from self._try_local(way, gated=False)
            fallback = outcome.generation
        else:
            way.meter.token()
            yield Piece(fallback.text, "local", thought=fallback.thinking or "")
        return self._local_answer(way, LocalOutcome(fallback, decision, False), "local", None)

    def _try_local(
        self, way: _Way, *, gated: bool, shown: list[str] | None = None
    ) -> Generator[Piece, None, LocalOutcome]:
        """Generates locally; what is yielded is kept in `shown`. While `gated` nothing is yielded before
        the gate has committed to local.

        A stream commits after `policy.early_tokens`; a whole answer is judged again at its end.
        """
        judged, held, committed = _Judged(), list[TokenPiece](), not gated
        shown = [] if shown is None else shown
        features, streaming = way.looked.features, way.looked.query.streaming
        stream = self._device.parts.model.submit_ids(way.looked.prompt_ids, way.request)
        way.cancellation.follow(stream)
        with stream:
            try:
                for piece in stream:
                    way.meter.count(thinking=piece.thinking)
                    held.append(piece)
                    at_border = judged.add(piece) and len(judged.logprobs) == self.policy.early_tokens
                    if at_border and not committed:
                        early = decide_after(judged.stats(None), features, self.policy)
                        if early.route == "cloud":
                            return LocalOutcome(None, early, hand_over=True)
                        committed = streaming
                    if committed:
                        ready, held = _joined(held), []
                        if ready or ready.thought:
                            shown.append(ready)
                            yield ready
                generation = stream.result()
            finally:
                way.meter.local(stream.queue_s, stream.busy_s)
        decision = decide_after(judged.stats(generation.finish_reason), features, self.policy)
        if only_thought(generation):
            decision = forced("cloud", (NO_ANSWER,), decision)
        doubted = gated and decision.route == "cloud" and not way.cancellation.wanted
        if doubted and not committed:
            return LocalOutcome(generation, decision, hand_over=True)
        ready = _joined(held)
        if ready or ready.thought:
            yield ready
        if doubted:
            # shown already, and never retracted: the answer stays local, with its low confidence in the open
            decision = forced("local", ("the answer was shown before its end was judged",), decision)
        return LocalOutcome(generation, decision, hand_over=False)

    def _ask_cloud(self, way: _Way, cloud: ChatModel, shown: list[str]) -> Generator[Piece, None, ChatResult]:
        """Passes on the cloud's pieces, and keeps their text in `shown`. Thinking alone is a failure."""
        way.meter.begin_anew()
        # what the rules have read, and no more: whatever the cloud is, it gets no field of a caller's own
        messages = tuple(map(sent_message, way.request.messages))
        stream = cloud.submit(ChatRequest(messages, params=way.request.params))
        way.cancellation.follow(stream)
        try:
            for piece in stream:
                if piece:
                    way.meter.token()
                    shown.append(piece)
                if piece or thought_of(piece):
                    yield Piece(piece, "cloud", thought=thought_of(piece))
            result = stream.result()
            if only_thought(result):
                raise NoAnswerError(f"the cloud {NO_ANSWER}")
            return result
        finally:
            stream.close()

    def _local_answer(
        self,
        way: _Way,
        outcome: LocalOutcome,
        source: Source,
        note: str | None,
        spent: Usage | None = None,
    ) -> Answer:
        """`spent`: tokens of a cloud that broke off."""
        generation = outcome.generation
        assert generation is not None, "only a hand-over ends without a generation"
        if only_thought(generation):
            note = "; ".join(filter(None, (note, f"the model {NO_ANSWER}")))
        return Answer(
            text=generation.text,
            thinking=generation.thinking,
            source=source,
            model=self._device.parts.model.name,
            confidence=outcome.decision.score,
            decision=outcome.decision,
            usage=generation.usage,
            timings=way.meter.timings(generation.timings.prefill_tps, generation.timings.decode_tps),
            cost=self._cost(way, spent),
            finish_reason=generation.finish_reason,
            note=note,
        )

    def _cloud_answer(self, way: _Way, result: ChatResult, decision: Decision) -> Answer:
        usage = result.usage or self._counted(way, (result.thinking or "") + result.text)
        return Answer(
            text=result.text,
            thinking=result.thinking,
            source="cloud",
            model=result.model,
            confidence=None,
            decision=decision,
            usage=usage,
            timings=way.meter.timings(),
            cost=self._cost(way, usage),
            finish_reason=result.finish_reason,
            # a tier below that is a Reasoner itself says what went wrong there
            note=result.note if isinstance(result, Answer) else None,
        )

    def _counted(self, way: _Way, text: str) -> Usage:
        """The endpoint did not count: the local tokenizer does, if it is there, or the length stands in."""
        opened = self._device.opened
        if opened is not None:
            with contextlib.suppress(EdgeReasonerError):
                prompt = way.looked.prompt_ids or opened.model.prompt_ids(way.request.messages)
                return Usage(len(prompt), len(opened.model.tokenizer.encode(text)))
        asked = sum(len(message_text(message)) for message in way.request.messages)
        return Usage(asked // _CHARS_PER_TOKEN + 1, len(text) // _CHARS_PER_TOKEN + 1)

    def _cost(self, way: _Way, cloud_usage: Usage | None) -> Cost:
        usd: float | None = 0.0
        if cloud_usage is not None:
            usd = None if self._price is None else self._price.cost_usd(cloud_usage)
        return Cost(usd, self._joules(way.meter.local_busy_s))

    def _joules(self, busy_s: float) -> float | None:
        power_w, opened = self._power_w, self._device.opened
        if power_w is None and opened is not None:
            power_w = opened.power_w
        if busy_s == 0 and opened is None:
            return 0.0  # the device's model was not even opened
        return None if power_w is None else power_w * busy_s


def only_thought(result: ChatResult) -> bool:
    """Whether an answer ended within its thinking, and not because its reader wanted that."""
    return bool(result.thinking) and not result.text.strip() and result.finish_reason != "cancelled"


def _joined(pieces: list[TokenPiece]) -> Piece:
    return Piece("".join(pieces), "local", thought="".join(piece.thought for piece in pieces))
