"""The decode loop: prompt in, tokens out, with the KV cache's prefix reused between calls."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from edge_reasoner.backends.base import DecoderModel, KVCache, Logits
from edge_reasoner.chat.model import FinishReason, Usage
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.engine.sampling import choose
from edge_reasoner.engine.stopping import StopMatcher
from edge_reasoner.engine.tokens import IncrementalDecoder, TextTokenizer
from edge_reasoner.errors import ContextOverflowError, EdgeReasonerError, InputError

#: Long prompts are fed in pieces of this many tokens: bounded activation memory, prompt cancellation.
PREFILL_CHUNK_TOKENS = 512


@dataclass(frozen=True)
class GeneratedToken:
    """One token of an answer. `text` may be empty or hold several tokens' text that became final together.

    The last item of a generation may carry text without a token (`token_id` None): what was held back.
    """

    token_id: int | None
    text: str
    logprob: float = 0.0
    margin: float = 0.0
    entropy: float = 0.0


@dataclass(frozen=True)
class DecodeTimings:
    """Durations of one generation. Rates are None where nothing was measured."""

    ttft_ms: float
    total_ms: float
    prefill_tps: float | None
    decode_tps: float | None


@dataclass(frozen=True)
class Generation:
    """A finished answer."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: DecodeTimings


#: Yields tokens; its return value (`yield from`, `StopIteration.value`) is the whole generation.
TokenStream = Generator[GeneratedToken, None, Generation]


def never_cancelled() -> bool:
    """The default of `cancelled`."""
    return False


class Engine:
    """One decoder with one cache, and the tokens in it. Not thread-safe; one generation at a time.

    Starting a generation ends an earlier one that was not exhausted.
    """

    def __init__(
        self,
        model: DecoderModel,
        cache: KVCache,
        tokenizer: TextTokenizer,
        *,
        eos_token_ids: Sequence[int],
        clock: Callable[[], float],
        prefill_chunk_tokens: int = PREFILL_CHUNK_TOKENS,
    ) -> None:
        """`clock` returns monotonic seconds; `eos_token_ids` end an answer and are not part of its text."""
        self._model, self._cache = model, cache
        self._tokenizer = tokenizer
        self._eos = frozenset(eos_token_ids)
        self._clock = clock
        self._chunk_tokens = prefill_chunk_tokens
        self._cached: list[int] = []
        self._epoch = 0

    @property
    def context_tokens(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return self._cache.context_tokens

    def check_fits(self, prompt_tokens: int, context_tokens: int | None = None) -> int:
        """The context limit in force. Raises ContextOverflowError unless one answer token has room in it."""
        limit = min(context_tokens or self.context_tokens, self.context_tokens)
        if prompt_tokens + 1 > limit:
            raise ContextOverflowError(
                f"the prompt has {prompt_tokens} tokens; at most {limit - 1} fit a context of {limit} tokens"
            )
        return limit

    def generate(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        cancelled: Callable[[], bool] = never_cancelled,
        context_tokens: int | None = None,
    ) -> TokenStream:
        """Answers `prompt_ids`. `context_tokens` lowers the cache's own limit for this call.

        The arguments are checked here, before any work; computing starts with the first `next`. Raises
        InputError, ContextOverflowError; while running BackendError.
        """
        prompt = [int(token) for token in prompt_ids]
        if not prompt:
            raise InputError("the prompt is empty: at least one token is needed")
        if min(prompt) < 0 or max(prompt) >= self._model.vocab_size:
            raise InputError(f"prompt: token ids must be from 0 to {self._model.vocab_size - 1}")
        limit = self.check_fits(len(prompt), context_tokens)
        return self._run(prompt, params, cancelled, limit)

    def close(self) -> None:
        """Releases cache and model."""
        self._cache.close()
        self._model.close()

    def _run(
        self, prompt: list[int], params: SamplingParams, cancelled: Callable[[], bool], limit: int
    ) -> TokenStream:
        start_s = self._clock()
        self._epoch += 1
        epoch = self._epoch
        rng = np.random.default_rng(params.seed)
        decoder, stopper = IncrementalDecoder(self._tokenizer), StopMatcher(params.stop)
        budget = min(params.max_tokens or limit, limit - len(prompt))
        finish: FinishReason = "length" if budget == params.max_tokens else "context"
        answer: list[int] = []
        shown: list[str] = []

        # 1. Reuse: keep the common prefix of cache and prompt, but feed at least the last prompt token.
        cached_tokens = self._reuse(prompt)
        # 2. Prefill: the rest of the prompt, in chunks; the last chunk's last logits choose the first token.
        logits = self._prefill(prompt[cached_tokens:], cancelled)
        prefilled_s = first_s = self._clock()
        if logits is None:
            budget, finish = 0, "cancelled"
        # 3. Decode: choose, stop or show, feed.
        while logits is not None and len(answer) < budget:
            choice = choose(
                logits[-1], params, rng, prompt + answer if params.repetition_penalty != 1 else ()
            )
            answer.append(choice.token_id)
            first_s = self._clock() if len(answer) == 1 else first_s
            if choice.token_id in self._eos:
                finish = "stop"
                break
            text = stopper.push(decoder.push(choice.token_id))
            shown.append(text)
            yield GeneratedToken(choice.token_id, text, choice.logprob, choice.margin, choice.entropy)
            if self._epoch != epoch:
                raise EdgeReasonerError("this stream ended when a newer query started on the same engine")
            if stopper.stopped or cancelled():
                finish = "stop" if stopper.stopped else "cancelled"
                break
            if len(answer) < budget:
                logits = self._extend([choice.token_id])
        # 4. Finish: release what was held back for a longer token or a stop string that never came.
        end_s = self._clock()
        if rest := stopper.push(decoder.flush()) + stopper.flush():
            shown.append(rest)
            yield GeneratedToken(None, rest)
        if stopper.stopped:
            finish = "stop"
        fed = len(prompt) - cached_tokens
        return Generation(
            text="".join(shown),
            token_ids=tuple(answer),
            finish_reason=finish,
            usage=Usage(len(prompt), len(answer), cached_tokens),
            timings=DecodeTimings(
                ttft_ms=(first_s - start_s) * 1e3,
                total_ms=(end_s - start_s) * 1e3,
                prefill_tps=_rate(fed, prefilled_s - start_s),
                decode_tps=_rate(len(answer) - 1, end_s - first_s),
            ),
        )

    def _reuse(self, prompt: list[int]) -> int:
        if self._cache.length_tokens != len(self._cached):
            # A failed call or another user of the cache: what it holds is not known.
            self._cached = []
        common = 0
        for cached, wanted in zip(self._cached, prompt[:-1], strict=False):
            if cached != wanted:
                break
            common += 1
        self._cache.rewind(common)
        del self._cached[common:]
        return common

    def _prefill(self, tokens: list[int], cancelled: Callable[[], bool]) -> Logits | None:
        logits: Logits | None = None
        for start in range(0, len(tokens), self._chunk_tokens):
            if cancelled():
                return None
            logits = self._extend(tokens[start : start + self._chunk_tokens])
        return logits

    def _extend(self, tokens: list[int]) -> Logits:
        logits = self._model.extend(self._cache, np.asarray(tokens, np.int64)).logits
        self._cached.extend(tokens)
        return logits


def _rate(count: int, seconds: float) -> float | None:
    return count / seconds if count > 0 and seconds > 0 else None
