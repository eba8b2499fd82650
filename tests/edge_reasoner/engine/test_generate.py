"""The decode loop on a scripted model."""

from __future__ import annotations

import functools
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_tokenizers import byte_level, wrap

from edge_reasoner.backends.fake import FakeDecoder
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.engine.generate import Engine, GeneratedToken, Generation, TokenStream
from edge_reasoner.engine.stopping import StopMatcher
from edge_reasoner.engine.tokens import TextTokenizer
from edge_reasoner.errors import BackendError, ContextOverflowError, EdgeReasonerError, InputError

PROMPT = [50, 51, 52, 53]


@functools.cache
def _tokenizer() -> TextTokenizer:
    return wrap(byte_level())


def _eos() -> int:
    found = _tokenizer().token_id("</s>")
    assert found is not None
    return found


def _engine(answer: str, context_tokens: int = 256, prompt_tokens: int = len(PROMPT), **options) -> Engine:
    ids = [*_tokenizer().encode(answer), _eos()]
    script = {prompt_tokens + i: token for i, token in enumerate(ids)}
    model = FakeDecoder(_tokenizer().vocab_size, context_tokens, script)
    clock = itertools.count().__next__
    return Engine(
        model,
        model.new_cache(),
        _tokenizer(),
        eos_token_ids=[_eos()],
        clock=lambda: clock() * 0.001,
        **options,
    )


def _drain(stream: TokenStream) -> tuple[list[GeneratedToken], Generation]:
    tokens = []
    while True:
        try:
            tokens.append(next(stream))
        except StopIteration as end:
            return tokens, end.value


def test_answer_until_eos() -> None:
    """The scripted answer comes out piece by piece and ends with reason "stop"; EOS has no text."""
    tokens, done = _drain(_engine("größer 你好 😀").generate(PROMPT, SamplingParams()))
    assert done.text == "".join(t.text for t in tokens) == "größer 你好 😀"
    assert done.finish_reason == "stop" and done.token_ids[-1] == _eos()
    assert done.usage.prompt_tokens == 4 and done.usage.completion_tokens == len(done.token_ids)
    assert all(t.logprob > -0.01 and t.margin > 0.99 for t in tokens)
    assert 0 < done.timings.ttft_ms < done.timings.total_ms and done.timings.decode_tps


def test_max_tokens_and_context() -> None:
    """max_tokens ends with "length"; a full context with "context", using every position but no more."""
    _, done = _drain(_engine("the quick brown").generate(PROMPT, SamplingParams(max_tokens=2)))
    assert (done.finish_reason, len(done.token_ids)) == ("length", 2)
    engine = _engine("the quick brown fox jumps", context_tokens=9)
    _, done = _drain(engine.generate(PROMPT, SamplingParams()))
    assert (done.finish_reason, len(done.token_ids)) == ("context", 5)
    _, done = _drain(_engine("the quick brown").generate(PROMPT, SamplingParams(), context_tokens=6))
    assert (done.finish_reason, len(done.token_ids)) == ("context", 2)


def test_prompt_must_fit_before_any_work() -> None:
    """A prompt that leaves no room for an answer, is empty or holds alien ids is refused untouched."""
    engine = _engine("x", context_tokens=4)
    with pytest.raises(ContextOverflowError, match="4 tokens; at most 3 fit"):
        engine.generate(PROMPT, SamplingParams())
    with pytest.raises(InputError, match="empty"):
        engine.generate([], SamplingParams())
    with pytest.raises(InputError, match="token ids"):
        engine.generate([10**9], SamplingParams())


@pytest.mark.parametrize("stop", ["brown", "n f", " fox jumps", "quick brown fox jumps over"])
def test_stop_strings_across_tokens(stop: str) -> None:
    """Text ends right before the stop string, and no part of it was ever shown."""
    answer = "the quick brown fox jumps over"
    tokens, done = _drain(_engine(answer).generate(PROMPT, SamplingParams(stop=(stop, "never"))))
    assert done.text == "".join(t.text for t in tokens) == answer[: answer.index(stop)]
    assert done.finish_reason == "stop"


def test_held_back_text_is_released() -> None:
    """Text that only looked like the start of a stop string is shown at the end."""
    tokens, done = _drain(_engine("the fox").generate(PROMPT, SamplingParams(stop=("fox jumps",))))
    assert done.text == "".join(t.text for t in tokens) == "the fox"


@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=8),
)
def test_stop_matcher_does_not_depend_on_cuts(text: str, stop: list[str], cuts: list[int]) -> None:
    """However text is cut, what is shown is the text before the first stop string, never more."""
    found = [at for at in (text.find(s) for s in stop) if at >= 0]
    borders = [0, *sorted(min(c, len(text)) for c in cuts), len(text)]
    matcher = StopMatcher(stop)
    shown = "".join(matcher.push(text[a:b]) for a, b in itertools.pairwise(borders)) + matcher.flush()
    assert matcher.stopped == bool(found)
    if not found:
        assert shown == text
    else:
        # cut text may meet a stop that ends earlier before one that starts earlier
        assert text.startswith(shown) and any(text[len(shown) :].startswith(s) for s in stop)
        assert all(s not in shown for s in stop)


def test_prefix_is_reused() -> None:
    """A second turn recomputes only what follows the common prefix; the same prompt only its last token."""
    engine = _engine("the fox")
    model = engine._model
    _, first = _drain(engine.generate(PROMPT, SamplingParams()))
    fed = model.fed_tokens
    second_prompt = [*PROMPT, *first.token_ids, 60, 61]
    _, second = _drain(engine.generate(second_prompt, SamplingParams(max_tokens=1)))
    assert second.usage.cached_tokens == len(PROMPT) + len(first.token_ids) - 1
    assert model.fed_tokens - fed == len(second_prompt) - second.usage.cached_tokens
    _, again = _drain(engine.generate(PROMPT, SamplingParams()))
    assert again.usage.cached_tokens == len(PROMPT) - 1 and again.text == "the fox"
    _, other = _drain(engine.generate([60, *PROMPT[1:]], SamplingParams(max_tokens=1)))
    assert other.usage.cached_tokens == 0


def test_abandoned_stream_leaves_the_engine_usable() -> None:
    """Closing a stream midway keeps cache and bookkeeping in step; a stale stream says that it ended."""
    engine = _engine("the quick brown fox")
    stream = engine.generate(PROMPT, SamplingParams())
    next(stream), next(stream)
    newer = engine.generate(PROMPT, SamplingParams())
    next(newer)
    with pytest.raises(EdgeReasonerError, match="newer query"):
        next(stream)
    newer.close()
    assert _drain(engine.generate(PROMPT, SamplingParams()))[1].text == "the quick brown fox"


def test_cancellation() -> None:
    """`cancelled` ends a generation between tokens, and a long prompt between chunks."""
    calls = itertools.count()
    engine = _engine("the quick brown fox")
    _, done = _drain(engine.generate(PROMPT, SamplingParams(), cancelled=lambda: next(calls) >= 2))
    assert done.finish_reason == "cancelled" and len(done.token_ids) == 2
    engine = _engine("the", prefill_chunk_tokens=1)
    calls = itertools.count()
    tokens, done = _drain(engine.generate(PROMPT, SamplingParams(), cancelled=lambda: next(calls) >= 2))
    assert (tokens, done.finish_reason, engine._model.fed_tokens) == ([], "cancelled", 2)


def test_chunked_prefill_gives_the_same_answer() -> None:
    """Prefill in chunks of any size gives the answer of one call."""
    for chunk in (1, 3, 4, 100):
        engine = _engine("the quick", prefill_chunk_tokens=chunk)
        assert _drain(engine.generate(PROMPT, SamplingParams()))[1].text == "the quick"


def test_failed_call_starts_afresh() -> None:
    """After a backend failure the next answer does not build on a cache that nobody knows."""

    class Failing(FakeDecoder):
        fail = False

        def extend(self, cache, token_ids, num_logits=1, *, hidden=False):
            if self.fail:
                raise BackendError("broken")
            return super().extend(cache, token_ids, num_logits, hidden=hidden)

    model = Failing(_tokenizer().vocab_size, 64, {4: _eos()})
    cache = model.new_cache()
    engine = Engine(model, cache, _tokenizer(), eos_token_ids=[_eos()], clock=lambda: 0.0)
    _drain(engine.generate(PROMPT, SamplingParams()))
    model.fail = True
    with pytest.raises(BackendError):
        _drain(engine.generate([*PROMPT, 9], SamplingParams()))
    model.fail = False
    cache.rewind(1)
    _, done = _drain(engine.generate(PROMPT, SamplingParams()))
    assert (done.finish_reason, done.usage.cached_tokens) == ("stop", 0)


def test_seeded_sampling_is_repeatable() -> None:
    """Uniform logits at temperature 1: the seed decides the answer."""

    def answer(seed: int) -> tuple[int, ...]:
        model = FakeDecoder(_tokenizer().vocab_size, 64)
        engine = Engine(model, model.new_cache(), _tokenizer(), eos_token_ids=[_eos()], clock=lambda: 0.0)
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=12)
        return _drain(engine.generate(PROMPT, params))[1].token_ids

    assert answer(1) == answer(1) != answer(2)
