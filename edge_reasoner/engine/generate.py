"""One answer's way through the model, a call at a time: prefill in chunks, then token by token.

Between two calls the engine's loop serves others, so nothing here waits for a reader and no view of the
model's buffers is kept over a pause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edge_reasoner.backends.base import DecoderModel, Step
from edge_reasoner.chat.model import ChatPiece, FinishReason, Usage
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.chat.thinking import Split, ThinkingSplitter, is_marker
from edge_reasoner.engine.prefix import CachedSequence, CachePool, HiddenMark, chunk_end
from edge_reasoner.engine.sampling import Choice, Scratch, choose
from edge_reasoner.engine.stopping import StopMatcher
from edge_reasoner.engine.tokens import IncrementalDecoder, TextTokenizer

Hidden = NDArray[np.float32]
#: no token's id: stands for what follows the known beginning of a prompt
_UNKNOWN = -1


class TokenPiece(ChatPiece):
    """One token of an answer: prints as its text, which may be empty, or that of several tokens that became
    final together. The statistics are of the model's own distribution, before sampling (natural logarithms).

    The last piece may carry text without a token (`token_id` None): what was held back. `thinking`: the token
    belongs to what a reasoning model writes before its answer, and so does all before it; its text is not
    shown, but is `thought`.
    """

    token_id: int | None
    logprob: float
    margin: float
    entropy: float
    thinking: bool

    __slots__ = ("entropy", "logprob", "margin", "thinking", "token_id")

    def __new__(
        cls,
        text: str,
        token_id: int | None = None,
        logprob: float = 0.0,
        margin: float = 0.0,
        entropy: float = 0.0,
        thinking: bool = False,
        thought: str = "",
    ) -> TokenPiece:
        """Makes a piece of `text`."""
        piece = super().__new__(cls, text, thought)
        piece.token_id = token_id
        piece.logprob = logprob
        piece.margin = margin
        piece.entropy = entropy
        piece.thinking = thinking
        return piece


@dataclass(frozen=True)
class DecodeTimings:
    """Durations of one generation, from its submission. Rates are None where nothing was measured.

    The rates and `busy_ms` are of this answer's own model calls; others' turns between them count in
    `ttft_ms` and `total_ms` only.
    """

    queue_ms: float
    ttft_ms: float
    total_ms: float
    busy_ms: float
    prefill_tps: float | None
    decode_tps: float | None


@dataclass(frozen=True)
class HiddenStates:
    """Outputs of the final norm, float32 [hidden]: at the last token and as the mean over all tokens.

    The answer's are of the tokens that the model has read: an answer's last token is not among them. Nor are
    the tokens of its thinking, of the markers around it and of the blanks after it. They are None where no
    token is left: the answer ended at its first token, or within its thinking.
    """

    prompt_last: Hidden
    prompt_mean: Hidden
    answer_last: Hidden | None
    answer_mean: Hidden | None


@dataclass(frozen=True)
class Generation:
    """A finished answer; see `ChatResult`. `hidden` only where the request asked for it."""

    text: str
    thinking: str | None
    model: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: DecodeTimings
    hidden: HiddenStates | None = None


@dataclass(frozen=True)
class DecodeRequest:
    """What the loop is asked to decode; checked already. `limit_tokens`: prompt and answer together."""

    prompt: tuple[int, ...]
    params: SamplingParams
    limit_tokens: int
    hidden: bool = False
    #: the end of the prompt as text, where the answer may begin with thinking; None: a raw text goes on
    prompt_tail: str | None = None

    @property
    def budget_tokens(self) -> int:
        """Most tokens of the answer."""
        return min(self.params.max_tokens or self.limit_tokens, self.limit_tokens - len(self.prompt))


class Listener(Protocol):
    """Whoever waits for the answer. `cancelled` may become true at any time."""

    @property
    def cancelled(self) -> bool: ...

    def show(self, piece: TokenPiece) -> None:
        """Takes a piece."""


class Stopwatch:
    """Seconds since the submission, and the seconds of them that were this answer's own."""

    def __init__(self, clock: Callable[[], float], submitted_s: float) -> None:
        self._clock = clock
        self._submitted_s = self._since_s = submitted_s
        self.busy_s = 0.0
        #: seconds until the first turn; None before it
        self.queue_s: float | None = None

    def resume(self) -> None:
        """This answer's turn begins."""
        self._since_s = self._clock()

    def pause(self) -> None:
        """This answer's turn ends, or a part of it."""
        now_s = self._clock()
        self.busy_s += now_s - self._since_s
        self._since_s = now_s

    def elapsed_s(self) -> float:
        """Seconds since the submission."""
        return self._clock() - self._submitted_s


@dataclass(frozen=True)
class Decoder:
    """What all answers of one model share."""

    model: DecoderModel
    tokenizer: TextTokenizer
    model_name: str
    eos_token_ids: frozenset[int]
    #: for the loop's thread
    scratch: Scratch

    def cancelled(self, request: DecodeRequest, watch: Stopwatch) -> Generation:
        """The answer of a request that was cancelled before it began."""
        waited_ms = watch.elapsed_s() * 1e3
        timings = DecodeTimings(waited_ms, waited_ms, waited_ms, 0.0, None, None)
        usage = Usage(len(request.prompt), 0)
        return Generation("", None, self.model_name, (), "cancelled", usage, timings)

    def extend(self, sequence: CachedSequence, tokens: tuple[int, ...], *, hidden: bool) -> Step:
        """Appends tokens; the step has the last one's logits."""
        step = self.model.extend(sequence.cache, np.asarray(tokens, np.int64), 1, hidden=hidden)
        sequence.tokens.extend(tokens)
        return step

    def feed_chunk(self, sequence: CachedSequence, prompt: tuple[int, ...], *, hidden: bool) -> Step:
        """Feeds the prompt up to the next chunk border: the same calls whatever was reused."""
        start = len(sequence.tokens)
        border = chunk_end(start)
        step = self.extend(sequence, prompt[start : min(border, len(prompt))], hidden=hidden)
        if step.hidden_sum is not None and step.hidden_last is not None:
            before = sequence.hidden_at(start)
            total = step.hidden_sum.copy() if before is None else before.total + step.hidden_sum
            sequence.mark_hidden(HiddenMark(total, step.hidden_last.copy()))
        if border <= len(prompt):
            sequence.mark_border()
        return step

    def feed_ahead(self, pool: CachePool, prompt: tuple[int, ...], *, hidden: bool) -> bool:
        """Feeds one more whole chunk of a prompt that is expected; whether another is left. BackendError."""
        expected = (*prompt, _UNKNOWN)
        if chunk_end(pool.cached_tokens(expected, hidden=hidden)) > len(prompt):
            return False
        sequence = pool.take(expected, len(prompt), hidden=hidden)
        if sequence is None:
            return False
        try:
            self.feed_chunk(sequence, prompt, hidden=hidden)
        except Exception:
            pool.drop(sequence)
            raise
        pool.give_back(sequence)
        return chunk_end(len(sequence.tokens)) <= len(prompt)


class Decoding:
    """One answer under way. Belongs to the loop's thread."""

    def __init__(
        self, request: DecodeRequest, sequence: CachedSequence, decoder: Decoder, watch: Stopwatch
    ) -> None:
        """`sequence` holds the part of the prompt that is reused."""
        self.generation: Generation | None = None
        self._request = request
        self._sequence = sequence
        self._decoder = decoder
        self._watch = watch
        self._answer: list[int] = []
        self._shown: list[str] = []
        self._splitter = None if request.prompt_tail is None else ThinkingSplitter(request.prompt_tail)
        self._answer_sum: Hidden | None = None
        self._answer_last: Hidden | None = None
        self._answer_fed = 0
        self._unshown_chars = 0

    def turns(self, listener: Listener) -> Iterator[None]:
        """Makes one model call a turn; ends when `generation` is set. Raises BackendError."""
        request, params = self._request, self._request.params
        watch, budget = self._watch, request.budget_tokens
        finish: FinishReason = "length" if budget == params.max_tokens else "context"
        rng = np.random.default_rng(params.seed)
        text = IncrementalDecoder(self._decoder.tokenizer, shows=self._shows())
        stopper = StopMatcher(params.stop)
        watch.resume()
        queue_s = watch.queue_s = watch.elapsed_s()
        reused = len(self._sequence.tokens)
        # 1. Prefill: what is not reused of the prompt; the last chunk's logits choose the first token.
        step: Step | None = None
        while len(self._sequence.tokens) < len(request.prompt) and not listener.cancelled:
            if step is not None:
                yield from self._others()
            step = self._prefill_chunk()
        whole = len(self._sequence.tokens) == len(request.prompt)
        watch.pause()
        prefill_s, ttft_s = watch.busy_s, watch.elapsed_s()
        # 2. Decode: choose and show, let others have their turn, feed.
        while not listener.cancelled and whole:
            assert step is not None, "at least one token of the prompt is fed"
            choice = choose(step.logits[-1], params, rng, self._penalized(), self._decoder.scratch)
            self._answer.append(choice.token_id)
            if len(self._answer) == 1:
                ttft_s = watch.elapsed_s()
            if choice.token_id in self._decoder.eos_token_ids:
                finish = "stop"
                break
            piece = self._piece(text.push(choice.token_id), stopper, choice)
            listener.show(piece)
            if stopper.stopped or len(self._answer) == budget:
                break
            yield from self._others()
            if not listener.cancelled:
                step = self._feed(choice.token_id, thinking=piece.thinking)
        else:
            finish = "cancelled"
        # 3. Finish: release what was held back for a longer token or a stop string that never came.
        rest = self._rest(text.flush(), stopper)
        if rest or rest.thought:
            listener.show(rest)
        watch.pause()
        timings = DecodeTimings(
            queue_ms=queue_s * 1e3,
            ttft_ms=ttft_s * 1e3,
            total_ms=watch.elapsed_s() * 1e3,
            busy_ms=watch.busy_s * 1e3,
            prefill_tps=_rate(len(request.prompt) - reused, prefill_s) if whole else None,
            decode_tps=_rate(len(self._answer) - 1, watch.busy_s - prefill_s),
        )
        self.generation = self._whole("stop" if stopper.stopped else finish, reused, timings)

    def _shows(self) -> Callable[[str], bool] | None:
        """Which special tokens are text all the same."""
        if self._splitter is None:
            return None
        harmony = self._decoder.tokenizer.token_id("<|channel|>") is not None
        return lambda token: is_marker(token, harmony=harmony)

    def _piece(self, text: str, stopper: StopMatcher, choice: Choice) -> TokenPiece:
        """The piece of a token that made `text` final. Stop strings are looked for in the answer alone."""
        splitter, thinking, thought = self._splitter, False, ""
        if splitter is not None:
            blocks, inside = splitter.blocks, splitter.in_thinking
            text = splitter.push(text)
            thinking = inside or splitter.before_answer or splitter.blocks > blocks
            thought = splitter.take_thought()
        return TokenPiece(
            self._show(text, stopper.push(text)),
            choice.token_id,
            choice.logprob,
            choice.margin,
            choice.entropy,
            thinking=thinking,
            thought=thought,
        )

    def _rest(self, text: str, stopper: StopMatcher) -> TokenPiece:
        """The last piece, of `text` that was held back until the end."""
        thought = ""
        if self._splitter is not None:
            text = self._splitter.push(text) + self._splitter.finish()
            thought = self._splitter.take_thought()
        return TokenPiece(self._show(text, stopper.push(text) + stopper.flush()), thought=thought)

    def _show(self, text: str, shown: str) -> str:
        """Counts what of the answer's text is not shown: held back, or from a stop string on."""
        self._unshown_chars += len(text) - len(shown)
        self._shown.append(shown)
        return shown

    def _others(self) -> Iterator[None]:
        self._watch.pause()
        yield
        self._watch.resume()

    def _penalized(self) -> list[int]:
        if self._request.params.repetition_penalty == 1:
            return []
        return [*self._request.prompt, *self._answer]

    def _prefill_chunk(self) -> Step:
        return self._decoder.feed_chunk(self._sequence, self._request.prompt, hidden=self._request.hidden)

    def _feed(self, token_id: int, *, thinking: bool) -> Step:
        step = self._decoder.extend(self._sequence, (token_id,), hidden=self._request.hidden)
        if thinking:
            # so is all before it: an opening marker may take several tokens, or only the closing one came
            self._answer_sum, self._answer_last, self._answer_fed = None, None, 0
        elif step.hidden_sum is not None and step.hidden_last is not None:
            last = step.hidden_last.copy()
            self._answer_sum = last if self._answer_sum is None else self._answer_sum + last
            self._answer_last = last
            self._answer_fed += 1
        return step

    def _whole(self, finish: FinishReason, reused: int, timings: DecodeTimings) -> Generation:
        split = Split("".join(self._shown), None)
        if self._splitter is not None:
            split = self._splitter.split()
            answer_chars = max(0, len(split.answer) - self._unshown_chars)
            split = replace(split, answer=split.answer[:answer_chars])
        return Generation(
            text=split.answer,
            thinking=split.thinking,
            model=self._decoder.model_name,
            token_ids=tuple(self._answer),
            finish_reason=finish,
            usage=Usage(len(self._request.prompt), len(self._answer), reused),
            timings=timings,
            hidden=self._hidden(),
        )

    def _hidden(self) -> HiddenStates | None:
        count = len(self._request.prompt)
        mark = self._sequence.hidden_at(count) if self._request.hidden else None
        if mark is None:
            return None
        mean = None if self._answer_sum is None else self._answer_sum / np.float32(self._answer_fed)
        return HiddenStates(mark.last, mark.total / np.float32(count), self._answer_last, mean)


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None
