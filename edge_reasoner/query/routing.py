"""One query's way: veto → preprocess → gate → local → gate → cloud or degraded. The order stands here only.

A query is a generator of `Piece`s whose return value is the `Answer`; `ask` drains it, `stream` passes it on.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from edge_reasoner.chat.messages import message_text
from edge_reasoner.chat.model import ChatModel, ChatRequest, ChatResult, Usage
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.cloud.base import CloudPrice
from edge_reasoner.contract.template.render import Message
from edge_reasoner.engine.generate import Generation
from edge_reasoner.engine.local_model import LocalModel
from edge_reasoner.errors import CloudError, ContextOverflowError, InputError
from edge_reasoner.gate.decide import AnswerStats, Decision, decide_after, decide_before, forced
from edge_reasoner.gate.policy import Mode, Policy
from edge_reasoner.gate.veto import Vetoes, vetoes
from edge_reasoner.preprocess.features import PromptFeatures
from edge_reasoner.preprocess.preprocessor import Preprocessor
from edge_reasoner.query.answer import Answer, Cost, Piece, Source, Timings

Pieces = Generator[Piece, None, Answer]


@dataclass
class Query:
    """One query under way: what was asked, and what has been measured so far."""

    messages: Sequence[Message]
    params: SamplingParams
    mode: Mode
    streaming: bool
    context_tokens: int | None
    start_s: float
    features: PromptFeatures = field(init=False)
    prompt_ids: list[int] = field(init=False)
    before: Decision = field(init=False)
    veto: Vetoes = field(init=False)
    queue_s: float = 0.0
    preprocess_ms: float = 0.0
    local_busy_s: float = 0.0
    first_token_s: float | None = None
    cloud_shown: str = ""


@dataclass(frozen=True)
class LocalOutcome:
    """How the local attempt ended. `generation` is None if it was given up early for the cloud."""

    generation: Generation | None
    decision: Decision
    hand_over: bool


class Router:
    """Answers queries with the parts it is given. Thread-safe: local work takes turns."""

    def __init__(
        self,
        local: LocalModel,
        preprocessor: Preprocessor,
        cloud: ChatModel | None,
        *,
        policy: Policy,
        price: CloudPrice | None,
        power_w: float | None,
        clock: Callable[[], float],
    ) -> None:
        """`power_w`: the board's draw under load, for the joules of an answer; None if unknown."""
        self.local = local
        self.policy = policy
        self._preprocessor = preprocessor
        self._cloud = cloud
        self._price = price
        self._power_w = power_w
        self._clock = clock
        self._turn_lock = threading.Lock()
        self._turn_owner: int | None = None

    def run(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        mode: Mode,
        streaming: bool,
        context_tokens: int | None = None,
    ) -> Pieces:
        """Answers a chat. Computing starts with the first `next`."""
        query = Query(messages, params, mode, streaming, context_tokens, self._clock())
        # 1. Look: features, embedding, length in tokens; what the owner forbids.
        self._prepare(query)
        # 2. Only one place is possible, or the gate chooses before any token is made.
        if query.mode == "cloud":
            return (yield from self._only_cloud(query))
        if query.veto.against_cloud:
            return (yield from self._only_local(query))
        if query.veto.against_local:
            wanted = forced("cloud", query.veto.against_local, query.before)
            return (yield from self._cloud_else_local(query, wanted, None))
        if query.before.route == "cloud":
            return (yield from self._cloud_else_local(query, query.before, None))
        # 3. The local model tries; the gate judges its first tokens and its whole answer.
        outcome = yield from self._try_local(query, gated=True)
        if not outcome.hand_over:
            return self._local_answer(query, outcome, "local", None)
        # 4. Not good enough: the cloud, with what the local model made as the fallback.
        yield Piece("", "handover")
        return (yield from self._cloud_else_local(query, outcome.decision, outcome.generation))

    def _prepare(self, query: Query) -> None:
        text = "\n".join(message_text(message) for message in query.messages)
        looked = self._preprocessor.run(message_text(query.messages[-1]))
        query.features, query.preprocess_ms = looked.features, looked.preprocess_ms
        query.prompt_ids = self.local.prompt_ids(query.messages)
        limit = min(query.context_tokens or self.local.context_tokens, self.local.context_tokens)
        query.before = decide_before(query.features, self.policy)
        query.veto = vetoes(
            text,
            prompt_tokens=len(query.prompt_ids),
            context_tokens=limit,
            policy=self.policy,
            mode=query.mode,
            has_cloud=self._cloud is not None,
        )

    def _only_cloud(self, query: Query) -> Pieces:
        if query.veto.forbidden:
            raise InputError(f"mode cloud is not allowed for this prompt: {'; '.join(query.veto.forbidden)}")
        if self._cloud is None:
            raise InputError("mode cloud: no cloud is configured; give the endpoint's URL")
        result = yield from self._ask_cloud(query, self._cloud)
        return self._cloud_answer(query, result, forced("cloud", ("mode is cloud",), query.before))

    def _only_local(self, query: Query) -> Pieces:
        reasons = query.veto.against_cloud
        if query.veto.against_local:
            why = "; ".join((*query.veto.against_local, *reasons))
            raise ContextOverflowError(f"neither the device nor the cloud can take this prompt: {why}")
        outcome = yield from self._try_local(query, gated=False)
        # Offline, an answer that the gate would have handed over says so.
        wanted = query.mode == "offline" and "cloud" in (query.before.route, outcome.decision.route)
        decision = forced("cloud" if wanted else "local", reasons, outcome.decision)
        note = f"{'; '.join(reasons)}: the cloud would have been asked" if wanted else None
        source: Source = "degraded" if wanted else "local"
        return self._local_answer(query, LocalOutcome(outcome.generation, decision, False), source, note)

    def _cloud_else_local(self, query: Query, decision: Decision, fallback: Generation | None) -> Pieces:
        """The cloud's answer; if the cloud fails, the local one, marked degraded with the reason."""
        assert self._cloud is not None, "vetoes exclude the cloud where none is configured"
        try:
            result = yield from self._ask_cloud(query, self._cloud)
        except CloudError as error:
            note = f"the cloud failed ({error}); answered on the device"
            if query.veto.against_local:
                why = "; ".join(query.veto.against_local)
                raise ContextOverflowError(f"{why}, and the cloud failed: {error}") from error
        else:
            return self._cloud_answer(query, result, decision)
        if query.cloud_shown:
            yield Piece(f"\n[{note}]\n", "degraded")
        if fallback is not None:
            yield Piece(fallback.text, "local")
        else:
            outcome = yield from self._try_local(query, gated=False)
            fallback, decision = outcome.generation, forced("cloud", decision.reasons, outcome.decision)
        return self._local_answer(query, LocalOutcome(fallback, decision, False), "degraded", note)

    def _try_local(self, query: Query, *, gated: bool) -> Generator[Piece, None, LocalOutcome]:
        """Generates locally. While `gated` nothing is yielded before the gate has committed to local.

        A stream commits after `policy.early_tokens`; a whole answer is judged again at its end.
        """
        token_ids: list[int] = []
        logprobs: list[float] = []
        margins: list[float] = []
        entropies: list[float] = []
        held: list[str] = []
        committed = not gated

        def judge(finish_reason: str | None) -> Decision:
            stats = AnswerStats.of(logprobs, margins, entropies, finish_reason, token_ids)
            return decide_after(stats, query.features, self.policy)

        with self._turn(query):
            stream = self.local.generate(query.prompt_ids, query.params, context_tokens=query.context_tokens)
            try:
                while True:
                    try:
                        token = next(stream)
                    except StopIteration as end:
                        generation: Generation = end.value
                        break
                    query.first_token_s = query.first_token_s or self._clock()
                    held.append(token.text)
                    if token.token_id is not None:
                        token_ids.append(token.token_id)
                        logprobs.append(token.logprob)
                        margins.append(token.margin)
                        entropies.append(token.entropy)
                        if not committed and len(logprobs) == self.policy.early_tokens:
                            early = judge(None)
                            if early.route == "cloud":
                                return LocalOutcome(None, early, hand_over=True)
                            committed = query.streaming
                    if committed:
                        text, held = "".join(held), []
                        if text:
                            yield Piece(text, "local")
            finally:
                stream.close()
        decision = judge(generation.finish_reason)
        if not committed and decision.route == "cloud":
            return LocalOutcome(generation, decision, hand_over=True)
        if text := "".join(held):
            yield Piece(text, "local")
        if gated and decision.route == "cloud":
            # shown already, and never retracted: the answer stays local, with its low confidence in the open
            decision = forced("local", ("the answer was shown before its end was judged",), decision)
        return LocalOutcome(generation, decision, hand_over=False)

    def _ask_cloud(self, query: Query, cloud: ChatModel) -> Generator[Piece, None, ChatResult]:
        stream = cloud.submit(ChatRequest(tuple(query.messages), params=query.params))
        query.first_token_s = None
        try:
            for text in stream:
                query.first_token_s = query.first_token_s or self._clock()
                query.cloud_shown += text
                yield Piece(text, "cloud")
            return stream.result()
        finally:
            stream.close()

    @contextmanager
    def _turn(self, query: Query) -> Iterator[None]:
        """The local session, one query at a time; the wait is the query's queue time."""
        if self._turn_owner == threading.get_ident():
            raise InputError("a stream of this thread is still open: exhaust or close it before asking again")
        waited_s = self._clock()
        with self._turn_lock:
            self._turn_owner = threading.get_ident()
            start_s = self._clock()
            query.queue_s += start_s - waited_s
            try:
                yield
            finally:
                query.local_busy_s += self._clock() - start_s
                self._turn_owner = None

    def _local_answer(self, query: Query, outcome: LocalOutcome, source: Source, note: str | None) -> Answer:
        generation = outcome.generation
        assert generation is not None, "only a hand-over ends without a generation"
        timings = generation.timings
        return Answer(
            text=generation.text,
            source=source,
            model=self.local.name,
            confidence=outcome.decision.score,
            decision=outcome.decision,
            usage=generation.usage,
            timings=self._timings(query, timings.prefill_tps, timings.decode_tps),
            cost=self._cost(query, self._shown_usage(query) if query.cloud_shown else None),
            finish_reason=generation.finish_reason,
            note=note,
        )

    def _cloud_answer(self, query: Query, result: ChatResult, decision: Decision) -> Answer:
        usage = result.usage or self._shown_usage(query)
        return Answer(
            text=query.cloud_shown,
            source="cloud",
            model=result.model,
            confidence=None,
            decision=decision,
            usage=usage,
            timings=self._timings(query, None, None),
            cost=self._cost(query, usage),
            finish_reason=result.finish_reason,
        )

    def _shown_usage(self, query: Query) -> Usage:
        # The endpoint did not count: the local tokenizer's count stands in.
        return Usage(len(query.prompt_ids), len(self.local.tokenizer.encode(query.cloud_shown)))

    def _timings(self, query: Query, prefill_tps: float | None, decode_tps: float | None) -> Timings:
        end_s = self._clock()
        return Timings(
            queue_ms=query.queue_s * 1e3,
            preprocess_ms=query.preprocess_ms,
            ttft_ms=((query.first_token_s or end_s) - query.start_s) * 1e3,
            total_ms=(end_s - query.start_s) * 1e3,
            prefill_tps=prefill_tps,
            decode_tps=decode_tps,
        )

    def _cost(self, query: Query, cloud_usage: Usage | None) -> Cost:
        usd: float | None = 0.0
        if cloud_usage is not None:
            usd = None if self._price is None else self._price.cost_usd(cloud_usage)
        return Cost(usd, None if self._power_w is None else self._power_w * query.local_busy_s)
