"""The kept caches: what is reused, what is dropped for room, and that no answer depends on it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.watched_model import WatchedModel, echo, engine_of

from edge_reasoner.backends.fake import FakeDecoder, FakeKVCache
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.engine.loop import Engine, EngineLimits
from edge_reasoner.engine.prefix import CacheLimits
from edge_reasoner.errors import BackendError, InputError

VOCAB = 400


def _next(tokens: Sequence[int]) -> int:
    """Depends on every token before: what was cached wrongly shows."""
    return hash(tuple(tokens)) % VOCAB


def _cold(prompt: Sequence[int], count: int) -> tuple[int, ...]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(_next(tokens))
    return tuple(tokens[len(prompt) :])


def _model(context_tokens: int = 1024) -> WatchedModel:
    return WatchedModel(FakeDecoder(VOCAB, context_tokens, _next))


def _kept(model: WatchedModel) -> list[FakeKVCache]:
    """The caches that were used and not released."""
    caches = {id(cache): cache for cache, _ in model.fed if isinstance(cache, FakeKVCache)}
    kept = []
    for cache in caches.values():
        try:
            cache.check_open()
        except BackendError:
            continue
        kept.append(cache)
    return kept


def _ask(engine: Engine, prompt: Sequence[int], max_tokens: int = 2) -> int:
    """Asks, checks the answer; how many tokens of the prompt were reused."""
    done = engine.submit(prompt, SamplingParams(max_tokens=max_tokens)).result()
    assert done.token_ids == _cold(prompt, max_tokens)
    return done.usage.cached_tokens


def _pool(model: WatchedModel, count: int = 8, kept_bytes: int | None = None) -> closing[Engine]:
    limits = EngineLimits(caches=CacheLimits(count, kept_bytes))
    return closing(engine_of(model, limits, kv_bytes_per_token=1))


@pytest.mark.parametrize("limits", [{"count": 0}, {"bytes": -1}])
def test_impossible_limits(limits: dict) -> None:
    """No cache at all, or less than no bytes, is refused."""
    with pytest.raises(InputError, match="is not allowed"):
        CacheLimits(**limits)
    with pytest.raises(InputError, match="is not allowed"):
        EngineLimits(active=0)


def test_the_longest_unused_goes_first() -> None:
    """With room for two a third drops the one that was used longest ago, not the one that was made first."""
    first, second, third = [1] * 40, [2] * 40, [3] * 40
    model = _model()
    with _pool(model, count=2) as engine:
        assert [_ask(engine, prompt) for prompt in (first, second, first, third)] == [0, 0, 32, 0]
        assert len(_kept(model)) == 2
        assert [_ask(engine, prompt) for prompt in (first, third, second)] == [32, 32, 0]


def test_bytes_are_bounded() -> None:
    """Caches are dropped for an answer's whole reservation; one answer is possible whatever it needs."""
    model = _model()
    with _pool(model, kept_bytes=200) as engine:
        assert [_ask(engine, [v] * 60) for v in (1, 2, 3)] == [0, 0, 0]
        assert len(_kept(model)) == 3
        assert _ask(engine, [4] * 40, max_tokens=50) == 0
        assert sum(cache.length_tokens for cache in _kept(model)) <= 200
        assert [_ask(engine, [v] * 60) for v in (3, 2)] == [32, 0]
        assert _ask(engine, [5] * 600) == 0
        assert len(_kept(model)) == 1
        assert _ask(engine, [5] * 600) == 576
        assert _ask(engine, [1] * 20) == 0
        assert sum(cache.length_tokens for cache in _kept(model)) <= 200


def test_busy_caches_are_forked() -> None:
    """A prompt that begins like one whose answer is under way shares its start, and takes nothing from it."""
    shared = list(range(100, 170))
    one, two = [*shared, 1, 2, 3], [*shared, 7, 8]
    model = _model()
    with _pool(model) as engine:
        with model.held():
            first = engine.submit(one, SamplingParams(max_tokens=30))
            model.arrive()
            model.step(8)
            second = engine.submit(two, SamplingParams(max_tokens=30))
        assert second.result().token_ids == _cold(two, 30)
        assert first.result().token_ids == _cold(one, 30)
        assert second.result().usage.cached_tokens == 64
        assert model.caches == 1 and len(_kept(model)) == 2, "the second is a copy"


def test_a_chat_keeps_its_prefix() -> None:
    """Other queries, some of which begin like the chat (a system prompt), leave its cache as it is."""
    system = list(range(100, 140))
    turns = [*system, *range(200, 280)]
    model = _model()
    with _pool(model, count=6) as engine:
        for turn, reused in enumerate([0, 64, 128, 128]):
            assert _ask(engine, turns, max_tokens=8) == reused
            turns = [*turns, *_cold(turns, 8), *range(300, 310)]
            for other in range(3):
                assert _ask(engine, [*system, other, turn]) == 32
                _ask(engine, [other, turn] * 20)


def test_what_cannot_fit_yet_drops_nothing() -> None:
    """A request that has to wait for a running one does not cost the caches that are kept meanwhile."""
    kept, running, large = [1] * 100, [2] * 40, [3] * 500
    model = _model()
    with _pool(model, kept_bytes=1000) as engine:
        _ask(engine, kept)
        with model.held():
            first = engine.submit(running, SamplingParams(max_tokens=600))
            model.arrive()
            waiting = engine.submit(large, SamplingParams(max_tokens=2))
            model.step(5)
            first.cancel()
        assert waiting.result().token_ids == _cold(large, 2)
        assert _ask(engine, kept) == 64


def test_short_memory_drops_what_is_kept() -> None:
    """Where the system gives no memory for another cache, the kept ones make room for it."""

    class Small(FakeDecoder):
        """Has memory for so many caches that are open."""

        room = 2

        def new_cache(self, context_tokens=None):
            if len(_kept(model)) >= self.room:
                raise BackendError("no memory")
            return super().new_cache(context_tokens)

    model = WatchedModel(Small(VOCAB, 256, _next))
    with _pool(model) as engine:
        assert [_ask(engine, [v] * 40) for v in (1, 2, 3, 3)] == [0, 0, 0, 32]
        assert len(_kept(model)) == 1


def test_a_cache_of_unknown_state_is_not_reused() -> None:
    """After a failed call the answer's cache is gone; a cancelled answer's stays of use."""
    model = echo()

    def before(tokens) -> None:
        if 9 in tokens:
            raise BackendError("broken")

    model.before = before
    with closing(engine_of(model)) as engine:
        start = [5] * 64
        with pytest.raises(BackendError, match="broken"):
            engine.submit([*start, 9], SamplingParams(max_tokens=2)).result()
        assert not _kept(model)
        with model.held():
            stream = engine.submit([*start, 6], SamplingParams(max_tokens=90))
            model.arrive()
            model.step(2)
            stream.cancel()
        done = engine.submit([*start, 7], SamplingParams(max_tokens=2)).result()
        assert done.usage.cached_tokens == 64 and done.token_ids == (7, 7)


STARTS = [list(range(start, start + 70)) for start in (0, 100, 200)]
PROMPTS = st.builds(
    lambda start, keep, tail: [*start[:keep], *tail],
    st.sampled_from(STARTS),
    st.sampled_from([0, 5, 31, 32, 33, 63, 64, 65, 70]),
    st.lists(st.integers(300, 303), min_size=1, max_size=40),
)
ROUNDS = st.lists(
    st.lists(st.tuples(PROMPTS, st.integers(1, 6), st.booleans()), min_size=1, max_size=4), max_size=6
)


@settings(deadline=None, max_examples=60)
@given(
    rounds=ROUNDS,
    count=st.integers(1, 4),
    kept_bytes=st.sampled_from([None, 0, 100, 250]),
)
def test_no_answer_depends_on_what_was_cached(rounds, count: int, kept_bytes: int | None) -> None:
    """Any sequence of prompts, several at once, under any limits: answers are the cold ones, what was reused
    and what was fed make up the prompts, and the limits hold."""
    model = _model(256)
    with _pool(model, count, kept_bytes) as engine:
        for asked in rounds:
            fed = sum(len(tokens) for _, tokens in model.fed)
            expected = 0
            with model.held():
                streams = [
                    engine.submit(prompt, SamplingParams(max_tokens=n), hidden=hidden)
                    for prompt, n, hidden in asked
                ]
            for (prompt, n, hidden), stream in zip(asked, streams, strict=True):
                done = stream.result()
                assert done.token_ids == _cold(prompt, n)
                assert 0 <= done.usage.cached_tokens < len(prompt)
                expected += len(prompt) - done.usage.cached_tokens + n - 1
                assert (done.hidden is not None) == hidden
                if done.hidden is not None:
                    assert done.hidden.prompt_last.tolist() == [prompt[-1], 1]
                    assert float(done.hidden.prompt_mean[0]) * len(prompt) == pytest.approx(sum(prompt))
            assert sum(len(tokens) for _, tokens in model.fed) - fed == expected
            kept = _kept(model)
            held = sum(cache.length_tokens for cache in kept)
            assert len(kept) <= count
            assert kept_bytes is None or held <= kept_bytes or len(kept) == 1


def test_what_is_expected_is_fed_ahead() -> None:
    """Whole chunks of a prompt's beginning are fed while nothing is asked; then the prompt finds them."""
    begin = list(range(100, 250))
    model = _model()
    with _pool(model) as engine:
        engine.prefill_ahead(begin)
        assert not model.fed, "no thread is started for what may not come"
        _ask(engine, [1])
        with model.held():
            engine.prefill_ahead(begin)
            engine.prefill_ahead([])
            engine.prefill_ahead([VOCAB])
            model.arrive()
            model.step(2)
        assert _ask(engine, [*begin, 7]) == 128
        assert [len(tokens) for _, tokens in model.fed[2:6]] == [32, 32, 64, 23]


def test_what_is_asked_goes_before_what_is_expected() -> None:
    """A request waits for one chunk at most; what is left of the expected prompt is fed after it."""
    begin, asked = list(range(100, 250)), [9] * 40
    model = _model()
    with _pool(model) as engine:
        _ask(engine, [1])
        with model.held():
            engine.prefill_ahead(begin)
            model.arrive()
            stream = engine.submit(asked, SamplingParams(max_tokens=2))
            model.step(3)
            assert [tokens[0] for _, tokens in model.fed[-4:]] == [100, 9, 9, _next(asked)]
            model.step(2)
            assert [tokens[0] for _, tokens in model.fed[-2:]] == [132, 164]
        assert stream.result().token_ids == _cold(asked, 2)
        assert _ask(engine, [*begin, 7]) == 128


@pytest.mark.parametrize("trouble", [BackendError("broken"), MemoryError("broken")])
def test_a_trouble_ahead_is_told_to_who_asks(trouble: Exception) -> None:
    """A call that fails ahead of a prompt costs its cache only; the prompt itself gets the error."""
    model = echo()

    def before(tokens) -> None:
        if 9 in tokens:
            raise trouble

    model.before = before
    with closing(engine_of(model)) as engine:
        assert engine.submit([5], SamplingParams(max_tokens=1)).result().token_ids == (5,)
        with model.held():
            engine.prefill_ahead([9] * 70)
            model.arrive()
        assert engine.submit([5], SamplingParams(max_tokens=2)).result().token_ids == (5, 5)
        with pytest.raises(type(trouble), match="broken"):
            engine.submit([9] * 70, SamplingParams(max_tokens=1)).result()
        assert all(9 not in tokens for cache in _kept(model) for c, tokens in model.fed if c is cache)


@settings(deadline=None, max_examples=40)
@given(prompts=st.lists(st.tuples(PROMPTS, PROMPTS, st.booleans()), min_size=1, max_size=6))
def test_no_answer_depends_on_what_was_fed_ahead(prompts) -> None:
    """Whatever was expected, right or wrong: answers and hidden states are the cold ones."""
    model = _model(256)
    with _pool(model, count=2) as engine:
        for expected, prompt, hidden in prompts:
            engine.prefill_ahead(expected, hidden=hidden)
            done = engine.submit(prompt, SamplingParams(max_tokens=3), hidden=hidden).result()
            assert done.token_ids == _cold(prompt, 3)
            if done.hidden is not None:
                assert done.hidden.prompt_last.tolist() == [prompt[-1], 1]
                assert float(done.hidden.prompt_mean[0]) * len(prompt) == pytest.approx(sum(prompt))


@settings(deadline=None, max_examples=30)
@given(prompts=st.lists(PROMPTS, min_size=1, max_size=8))
def test_chunks_depend_on_the_position_alone(prompts) -> None:
    """Whatever was reused, a prompt's tokens are fed in the same calls: answers are the same, bit for bit."""
    model = _model(256)
    calls: dict[tuple[int, ...], int] = {}
    with _pool(model) as engine:
        for prompt in prompts:
            begun = len(model.fed)
            done = engine.submit(prompt, SamplingParams(max_tokens=1)).result()
            at = done.usage.cached_tokens
            for _, tokens in model.fed[begun:]:
                read = tuple(prompt[: at + len(tokens)])
                assert calls.setdefault(read, len(tokens)) == len(tokens)
                at += len(tokens)
            assert at == len(prompt)
