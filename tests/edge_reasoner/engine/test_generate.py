"""The decode loop on a scripted model."""

from __future__ import annotations

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_tokenizers import byte_level, wrap

from edge_reasoner.backends.base import DecoderModel
from edge_reasoner.backends.fake import FakeDecoder
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.engine.generate import Generation, TokenPiece
from edge_reasoner.engine.loop import Engine, TokenStream
from edge_reasoner.engine.prefix import MIN_CHUNK_TOKENS, chunk_end
from edge_reasoner.engine.stopping import StopMatcher
from edge_reasoner.engine.tokens import TextTokenizer
from edge_reasoner.errors import BackendError, ContextOverflowError, InputError

PROMPT = [50, 51, 52, 53]


@functools.cache
def _tokenizer() -> TextTokenizer:
    return wrap(byte_level())


def _eos() -> int:
    found = _tokenizer().token_id("</s>")
    assert found is not None
    return found


def _model(answer: str, context_tokens: int = 256, prompt_tokens: int = len(PROMPT)) -> FakeDecoder:
    """Says `answer` after a prompt of `prompt_tokens`."""
    ids = [*_tokenizer().encode(answer), _eos()]
    return FakeDecoder(
        _tokenizer().vocab_size, context_tokens, {prompt_tokens + i: token for i, token in enumerate(ids)}
    )


def _engine_of(model: DecoderModel) -> Engine:
    clock = itertools.count().__next__
    return Engine(model, _tokenizer(), name="fake", eos_token_ids=[_eos()], clock=lambda: clock() * 0.001)


def _engine(answer: str, context_tokens: int = 256) -> Engine:
    return _engine_of(_model(answer, context_tokens))


def _drain(stream: TokenStream) -> tuple[list[TokenPiece], Generation]:
    return list(stream), stream.result()


def test_answer_until_eos() -> None:
    """The scripted answer comes out piece by piece and ends with reason "stop"; EOS has no text."""
    tokens, done = _drain(_engine("größer 你好 😀").submit(PROMPT, SamplingParams()))
    assert done.text == "".join(tokens) == "größer 你好 😀"
    assert done.finish_reason == "stop" and done.token_ids[-1] == _eos()
    assert done.usage.prompt_tokens == 4 and done.usage.completion_tokens == len(done.token_ids)
    assert all(t.logprob > -0.01 and t.margin > 0.99 for t in tokens)
    assert 0 < done.timings.ttft_ms < done.timings.total_ms and done.timings.decode_tps


def test_max_tokens_and_context() -> None:
    """max_tokens ends with "length"; a full context with "context", using every position but no more."""
    _, done = _drain(_engine("the quick brown").submit(PROMPT, SamplingParams(max_tokens=2)))
    assert (done.finish_reason, len(done.token_ids)) == ("length", 2)
    engine = _engine("the quick brown fox jumps", context_tokens=9)
    _, done = _drain(engine.submit(PROMPT, SamplingParams()))
    assert (done.finish_reason, len(done.token_ids)) == ("context", 5)
    _, done = _drain(_engine("the quick brown").submit(PROMPT, SamplingParams(), context_tokens=6))
    assert (done.finish_reason, len(done.token_ids)) == ("context", 2)


def test_prompt_must_fit_before_any_work() -> None:
    """A prompt that leaves no room for an answer, is empty or holds alien ids is refused untouched."""
    engine = _engine("x", context_tokens=4)
    with pytest.raises(ContextOverflowError, match="4 tokens; at most 3 fit"):
        engine.submit(PROMPT, SamplingParams())
    with pytest.raises(InputError, match="empty"):
        engine.submit([], SamplingParams())
    with pytest.raises(InputError, match="token ids"):
        engine.submit([10**9], SamplingParams())


@pytest.mark.parametrize("stop", ["brown", "n f", " fox jumps", "quick brown fox jumps over"])
def test_stop_strings_across_tokens(stop: str) -> None:
    """Text ends right before the stop string, and no part of it was ever shown."""
    answer = "the quick brown fox jumps over"
    tokens, done = _drain(_engine(answer).submit(PROMPT, SamplingParams(stop=(stop, "never"))))
    assert done.text == "".join(tokens) == answer[: answer.index(stop)]
    assert done.finish_reason == "stop"


def test_held_back_text_is_released() -> None:
    """Text that only looked like the start of a stop string is shown at the end."""
    tokens, done = _drain(_engine("the fox").submit(PROMPT, SamplingParams(stop=("fox jumps",))))
    assert done.text == "".join(tokens) == "the fox"


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


def test_whole_prompt_chunks_are_reused() -> None:
    """A second turn recomputes only what follows the last whole chunk of the common prompt."""
    prompt = [60 + i % 40 for i in range(2 * MIN_CHUNK_TOKENS + 5)]
    model = _model("the fox", prompt_tokens=len(prompt))
    engine = _engine_of(model)
    _, first = _drain(engine.submit(prompt, SamplingParams()))
    fed = model.fed_tokens
    second_prompt = [*prompt, *first.token_ids, 60, 61]
    _, second = _drain(engine.submit(second_prompt, SamplingParams(max_tokens=1)))
    assert second.usage.cached_tokens == 2 * MIN_CHUNK_TOKENS
    assert model.fed_tokens - fed == len(second_prompt) - second.usage.cached_tokens
    _, again = _drain(engine.submit(prompt, SamplingParams()))
    assert again.usage.cached_tokens == 2 * MIN_CHUNK_TOKENS and again.text == "the fox"
    _, other = _drain(engine.submit([99, *prompt[1:]], SamplingParams(max_tokens=1)))
    assert other.usage.cached_tokens == 0


@given(st.integers(0, 5000))
def test_chunk_borders_depend_on_the_position_alone(position: int) -> None:
    """Every position leads to a later border, and the same one as its neighbours before that border."""
    border = chunk_end(position)
    assert border > position and all(chunk_end(p) == border for p in range(position, border))


def test_several_answers_at_once() -> None:
    """A second question while the first answer is half read: both come out whole."""
    engine = _engine("the quick brown fox")
    one = engine.submit(PROMPT, SamplingParams())
    next(one), next(one)
    two = engine.submit(PROMPT, SamplingParams())
    assert two.result().text == "the quick brown fox" == one.result().text


def test_cancellation() -> None:
    """A stream cancelled before it is read ends with "cancelled" and what was computed until then."""
    engine = _engine("the quick brown fox")
    stream = engine.submit(PROMPT, SamplingParams())
    next(stream)
    stream.cancel()
    done = stream.result()
    assert done.finish_reason in ("cancelled", "stop") and "the quick brown fox".startswith(done.text)
    stream = engine.submit(PROMPT, SamplingParams())
    stream.close()
    with pytest.raises(InputError, match="closed before its end"):
        stream.result()
    assert engine.submit(PROMPT, SamplingParams()).result().text == "the quick brown fox"


def test_hidden_states_of_prompt_and_answer() -> None:
    """Last and mean over prompt and answer, warm or cold: the fake's state of a token is [its id, 1]."""
    prompt = [60 + i % 40 for i in range(MIN_CHUNK_TOKENS + 5)]
    engine = _engine_of(_model("the fox", prompt_tokens=len(prompt)))
    for _ in range(2):
        done = engine.submit(prompt, SamplingParams(), hidden=True).result()
        assert done.hidden is not None and done.hidden.answer_mean is not None
        assert done.hidden.prompt_last.tolist() == [prompt[-1], 1]
        assert np.allclose(done.hidden.prompt_mean, [np.mean(prompt), 1])
        assert np.allclose(done.hidden.answer_mean, [np.mean(done.token_ids[:-1]), 1])
    assert done.usage.cached_tokens == MIN_CHUNK_TOKENS


def test_failed_call_starts_afresh() -> None:
    """After a backend failure the next answer does not build on a cache that nobody knows."""

    class Failing(FakeDecoder):
        fail = False

        def extend(self, cache, token_ids, num_logits=1, *, hidden=False):
            if self.fail:
                raise BackendError("broken")
            return super().extend(cache, token_ids, num_logits, hidden=hidden)

    model = Failing(_tokenizer().vocab_size, 64, {4: _eos()})
    engine = _engine_of(model)
    engine.submit(PROMPT, SamplingParams()).result()
    model.fail = True
    with pytest.raises(BackendError):
        engine.submit([*PROMPT, 9], SamplingParams()).result()
    model.fail = False
    done = engine.submit(PROMPT, SamplingParams()).result()
    assert (done.finish_reason, done.usage.cached_tokens) == ("stop", 0)


def test_seeded_sampling_is_repeatable() -> None:
    """Uniform logits at temperature 1: the seed decides the answer."""

    def answer(seed: int) -> tuple[int, ...]:
        engine = _engine_of(FakeDecoder(_tokenizer().vocab_size, 64))
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=12)
        return _drain(engine.submit(PROMPT, params))[1].token_ids

    assert answer(1) == answer(1) != answer(2)


def test_thinking_is_told_apart() -> None:
    """In a chat what stands in a block is not shown, and its tokens say so; a raw text goes on as it is."""
    raw = "<think>why</think>so"
    engine = _engine(raw)
    pieces, done = _drain(engine.submit(PROMPT, SamplingParams(), chat=True))
    assert (done.text, done.thinking, "".join(pieces)) == ("so", "why", "so")
    assert any(piece.thinking for piece in pieces) and not pieces[-1].thinking
    assert engine.submit(PROMPT, SamplingParams()).result().text == raw
    unclosed = SamplingParams(max_tokens=len(_tokenizer().encode("<think>wh")))
    done = engine.submit(PROMPT, unclosed, chat=True).result()
    assert done.text == "" and done.thinking


def test_thinking_comes_with_the_pieces() -> None:
    """What is thought is told beside the text; stop strings are looked for in the answer alone."""
    engine = _engine("<think>the fox jumps</think>\n\nthe quick brown fox jumps over")
    pieces, done = _drain(engine.submit(PROMPT, SamplingParams(stop=("fox",)), chat=True))
    assert "".join(piece.thought for piece in pieces) == done.thinking == "the fox jumps"
    assert "".join(pieces) == done.text == "the quick brown " and done.finish_reason == "stop"
    assert not any(piece.thought for piece in _engine("the fox").submit(PROMPT, SamplingParams(), chat=True))


@pytest.mark.parametrize("said", ["<think>why</think>\n\nso it is", "why not</think>so it is", "so it is"])
def test_hidden_states_are_of_the_answer(said: str) -> None:
    """Thinking and its markers, which take several tokens, are left out of the means; raw texts are whole."""
    stream = _engine(said).submit(PROMPT, SamplingParams(), hidden=True, chat=True)
    pieces, done = _drain(stream)
    thought = [index for index, piece in enumerate(pieces) if piece.thinking]
    ids = [piece.token_id for piece in pieces[max(thought, default=-1) + 1 :] if piece.token_id is not None]
    assert done.text == _tokenizer().decode(ids) == "so it is"
    # the fake decoder's hidden states are [token id, 1]
    assert done.hidden.answer_mean == pytest.approx([np.mean(ids), 1])
    assert done.hidden.answer_last.tolist() == [ids[-1], 1]
    assert done.hidden.prompt_mean == pytest.approx([np.mean(PROMPT), 1])
    raw = _engine(said).submit(PROMPT, SamplingParams(), hidden=True).result()
    assert raw.hidden.answer_mean == pytest.approx([np.mean(_tokenizer().encode(said)), 1])


@pytest.mark.parametrize("said", ["<think>why</think>", "<think>why", "why</think>\n\n"])
def test_thinking_alone_has_no_hidden_states(said: str) -> None:
    """Where no token is outside the thinking there is no answer to take the mean of."""
    done = _engine(said).submit(PROMPT, SamplingParams(), hidden=True, chat=True).result()
    assert done.text == "" and done.thinking == "why"
    assert done.hidden.answer_mean is None and done.hidden.answer_last is None
