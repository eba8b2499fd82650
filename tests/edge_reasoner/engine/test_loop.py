"""The scheduler: who is served when, who is not held up, and what ends a request. Nothing here sleeps."""

from __future__ import annotations

import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from support.watched_model import TIMEOUT_S, WatchedModel, echo, engine_of

from edge_reasoner.backends.fake import FakeDecoder
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.engine.generate import Generation, TokenPiece
from edge_reasoner.engine.loop import Engine, EngineLimits, TokenStream
from edge_reasoner.engine.prefix import CacheLimits
from edge_reasoner.errors import BackendError, InputError, OverloadedError

ONE_AT_A_TIME = EngineLimits(active=1)
A, B, C = 50, 60, 70


def _said(stream: TokenStream) -> list[tuple[str, int | None, float, float, float]]:
    return [(str(p), p.token_id, p.logprob, p.margin, p.entropy) for p in stream]


def _asks(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens)


@contextmanager
def _closing(engine: Engine, model: WatchedModel) -> Iterator[Engine]:
    try:
        yield engine
    finally:
        model.release()
        engine.close()


def test_interleaved_answers_are_those_of_two_models() -> None:
    """Two requests take turns on one model; tokens and statistics are as if each had its own."""

    def script(tokens) -> int:
        return (7 * tokens[-1] + len(tokens)) % 400

    asked = [
        ([A] * 40, SamplingParams(max_tokens=20, temperature=1.5, seed=3)),
        ([B] * 70, SamplingParams(max_tokens=20, repetition_penalty=1.3)),
    ]
    alone = []
    for prompt, params in asked:
        with _closing(engine_of(model := WatchedModel(FakeDecoder(400, 512, script))), model) as engine:
            alone.append(_said(engine.submit(prompt, params)))
    model = WatchedModel(FakeDecoder(400, 512, script))
    with _closing(engine_of(model), model) as engine:
        with model.held():
            streams = [engine.submit(prompt, params) for prompt, params in asked]
            model.arrive()
        together = [_said(stream) for stream in streams]
    assert together == alone
    caches = [id(cache) for cache, _ in model.fed]
    changes = sum(one != other for one, other in itertools.pairwise(caches))
    assert changes > 30, "they took turns"


def test_a_reader_that_stops_holds_nobody_up() -> None:
    """More unread streams than places: later requests are answered, and the unread answers are whole."""
    model = echo()
    with _closing(engine_of(model, EngineLimits(active=2)), model) as engine:
        unread = [engine.submit([A + i] * 3, _asks(30)) for i in range(6)]
        half_read = engine.submit([B] * 3, _asks(30))
        next(half_read)
        assert engine.submit([C] * 3, _asks(5)).result().token_ids == (C,) * 5
        for i, stream in enumerate(unread):
            assert stream.result().token_ids == (A + i,) * 30
        assert len(list(half_read)) == 29


def test_asking_between_two_pieces() -> None:
    """No lock is held while a reader's code runs: it asks, cancels and closes streams of the same engine."""
    model = echo()
    with _closing(engine_of(model, ONE_AT_A_TIME), model) as engine:
        for count, _ in enumerate(engine.submit([A] * 3, _asks(4))):
            other = engine.submit([B + count], _asks(3))
            other_again = engine.submit([C], _asks(3))
            other_again.cancel()
            assert other.result().token_ids == (B + count,) * 3
            other_again.close()


def test_a_thread_may_read_while_another_cancels() -> None:
    """A reader that waits for its next piece is woken by another thread's `cancel`, and by its `close`."""
    for end in (TokenStream.cancel, TokenStream.close):
        model = echo()
        with _closing(engine_of(model), model) as engine, model.held():
            stream = engine.submit([A] * 3, _asks(30))
            model.arrive()
            read: list[list[TokenPiece]] = []
            reader = threading.Thread(target=lambda s=stream, r=read: r.append(list(s)))
            reader.start()
            end(stream)
            model.release()
            reader.join(TIMEOUT_S)
            assert not reader.is_alive() and len(read[0]) <= 1


def _dropped(streams: list[TokenStream]) -> None:
    streams.clear()
    gc.collect()


ENDS: dict[str, Callable[[list[TokenStream]], None]] = {
    "dropped": _dropped,
    "closed": lambda streams: streams[0].close(),
    "cancelled": lambda streams: streams[0].cancel(),
    "left": lambda streams: streams[0].__exit__(None, None, None),
}


@pytest.mark.parametrize("end", list(ENDS))
@pytest.mark.parametrize("calls_before", [0, 1, 2, 3, 4, 6])
def test_an_ended_stream_costs_no_further_call(end: str, calls_before: int) -> None:
    """In the queue (0 calls), within a long prompt (1 to 3: its chunks) and within the answer."""
    model = echo()
    limits = ONE_AT_A_TIME if calls_before == 0 else None
    with _closing(engine_of(model, limits), model) as engine:
        with model.held():
            first = engine.submit([C], _asks(50)) if calls_before == 0 else None
            streams = [engine.submit([A] * 200, _asks(50))]
            model.arrive()
            model.step(max(0, calls_before - 1))
            assert model.calls_with(A) == calls_before
            ENDS[end](streams)
            other = engine.submit([B], _asks(5))
        if first is not None:
            first.close()
        assert other.result().token_ids == (B,) * 5
        # the call that was under way then is the last
        assert model.calls_with(A) == calls_before


@pytest.mark.parametrize("calls_before", [0, 2, 7])
def test_what_a_cancelled_answer_says(calls_before: int) -> None:
    """It ends with "cancelled", the pieces that were made until then, and their count."""
    model = echo()
    with _closing(engine_of(model, ONE_AT_A_TIME), model) as engine:
        with model.held():
            first = engine.submit([C], _asks(50)) if calls_before == 0 else None
            stream = engine.submit([A] * 200, _asks(50))
            model.arrive()
            model.step(max(0, calls_before - 1))
            stream.cancel()
        if first is not None:
            first.cancel()
        done = stream.result()
        # a prompt of 200 tokens is five calls; then each call is followed by a token
        tokens = max(0, calls_before - 5)
        assert (done.finish_reason, len(done.token_ids)) == ("cancelled", tokens)
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (200, tokens)


def test_cancelled_requests_free_their_places_in_the_queue() -> None:
    """A full queue refuses; one given-up request later there is room, though the loop had no turn."""
    model = echo()
    with _closing(engine_of(model, EngineLimits(active=1, waiting=2)), model) as engine, model.held():
        streams = [engine.submit([A], _asks(2)) for _ in range(3)]
        model.arrive()
        with pytest.raises(OverloadedError, match="1 requests are being answered and 2 wait"):
            engine.submit([B], _asks(2))
        streams.pop()
        gc.collect()
        streams.append(engine.submit([B], _asks(2)))
        with pytest.raises(OverloadedError):
            engine.submit([B], _asks(2))
        model.release()
        assert [stream.result().finish_reason for stream in streams] == ["length"] * 3


def test_a_failure_is_one_request_s_alone() -> None:
    """The backend fails in one answer: its pieces, then its error; the other's answer is untouched."""
    model = echo()
    failing = itertools.count()

    def before(tokens) -> None:
        if A in tokens and next(failing) == 3:
            raise BackendError("broken")

    model.before = before
    with _closing(engine_of(model), model) as engine:
        with model.held():
            bad, good = engine.submit([A], _asks(9)), engine.submit([B], _asks(9))
            model.arrive()
        pieces = [next(bad) for _ in range(3)]
        assert [piece.token_id for piece in pieces] == [A] * 3
        for read in (lambda: next(bad), bad.result, lambda: next(bad)):
            with pytest.raises(BackendError, match="broken"):
                read()
        assert good.result().token_ids == (B,) * 9
        assert engine.submit([A], _asks(9)).result().token_ids == (A,) * 9


def test_no_memory_for_a_cache_is_one_request_s_alone() -> None:
    """A cache that cannot be made fails its request; the next one is served."""

    class Small(FakeDecoder):
        refuse = False

        def new_cache(self, context_tokens=None):
            if self.refuse:
                raise BackendError("no memory")
            return super().new_cache(context_tokens)

    inner = Small(400, 256, lambda tokens: tokens[-1])
    model = WatchedModel(inner)
    with _closing(engine_of(model), model) as engine:
        inner.refuse = True
        with pytest.raises(BackendError, match="no memory"):
            engine.submit([A], _asks(2)).result()
        inner.refuse = False
        assert engine.submit([B], _asks(2)).result().token_ids == (B, B)


def test_alien_logits_are_an_error_of_the_answer() -> None:
    """Logits that are no numbers end the answer with a BackendError, not the loop."""

    class Odd(FakeDecoder):
        def extend(self, cache, token_ids, num_logits=1, *, hidden=False):
            step = super().extend(cache, token_ids, num_logits, hidden=hidden)
            if A in token_ids:
                step.logits[:] = np.nan
            return step

    model = WatchedModel(Odd(400, 256, lambda tokens: tokens[-1]))
    with _closing(engine_of(model), model) as engine:
        with pytest.raises(BackendError, match="not finite"):
            engine.submit([A], SamplingParams(max_tokens=4, temperature=1.0, top_p=0.5)).result()
        assert engine.submit([B], _asks(2)).result().token_ids == (B, B)


def test_closing_fails_what_is_unfinished() -> None:
    """Running and queued requests end with a clear error; finished ones keep their answers."""
    model = echo()
    engine = engine_of(model, ONE_AT_A_TIME)
    with _closing(engine, model):
        finished = engine.submit([C], _asks(2))
        finished.result()
        with model.held():
            running, queued = engine.submit([A], _asks(50)), engine.submit([B], _asks(50))
            model.arrive()
            model.step(2)
            closer = threading.Thread(target=engine.close)
            closer.start()
            # closing waits for the call under way; that it has begun shows in what it refuses
            with pytest.raises(BackendError, match="the model is closed"):
                while True:
                    engine.submit([C], _asks(1)).close()
            assert closer.is_alive() and not model.closed
        closer.join(TIMEOUT_S)
        assert not closer.is_alive() and model.closed
        calls = len(model.fed)
        assert [next(running).token_id for _ in range(2)] == [A, A]
        for stream in (running, queued):
            with pytest.raises(BackendError, match="closed before the answer was done"):
                for _ in stream:
                    pass
        assert model.calls_with(B) == 0 and len(model.fed) == calls
        assert finished.result().token_ids == (C, C)
        engine.close()


def test_closing_an_engine_that_never_ran() -> None:
    """Without a request there is no thread, and the model is released all the same."""
    model = echo()
    threads = threading.active_count()
    engine = engine_of(model)
    assert threading.active_count() == threads
    engine.close()
    assert model.closed
    with pytest.raises(BackendError, match="closed"):
        engine.submit([A], _asks(1))


def test_a_dropped_engine_ends_its_thread() -> None:
    """An engine that nobody holds is closed; a stream alone holds it."""
    model = echo()
    before = set(threading.enumerate())
    engine = engine_of(model)
    stream = engine.submit([A], _asks(20))
    (thread,) = set(threading.enumerate()) - before
    del engine
    gc.collect()
    assert stream.result().token_ids == (A,) * 20
    del stream
    gc.collect()
    thread.join(TIMEOUT_S)
    assert not thread.is_alive() and model.closed


def test_no_thread_to_be_had_is_a_backend_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system gives no thread the request fails in our own words; the next one is served."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    model = echo()
    with _closing(engine_of(model), model) as engine:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises(BackendError, match="thread"):
                engine.submit([A], _asks(2))
        assert engine.submit([B], _asks(2)).result().token_ids == (B, B)
        assert model.calls_with(A) == 0


def test_a_long_prompt_takes_turns_with_an_answer() -> None:
    """Between two chunks of a prompt the other answer gets a token, from the first chunk on."""
    model = echo()
    with _closing(engine_of(model), model) as engine:
        with model.held():
            answer = engine.submit([A], _asks(40))
            model.arrive()
            long = engine.submit([B] * 1500, _asks(5))
        assert answer.result().token_ids == (A,) * 40
        assert long.result().token_ids == (B,) * 5
    owners = [tokens[0] for _, tokens in model.fed]
    chunks = [at for at, owner in enumerate(owners) if owner == B][:9]
    assert len(model.fed[chunks[-1]][1]) > 1, "those are chunks of the prompt"
    assert all(later - earlier == 2 for earlier, later in itertools.pairwise(chunks))
    assert max(len(tokens) for _, tokens in model.fed) <= 256


def test_requests_begin_in_their_order() -> None:
    """First come, first served: whoever waits is not overtaken."""
    model = echo()
    with _closing(engine_of(model, EngineLimits(active=2)), model) as engine:
        with model.held():
            streams = [engine.submit([A + i], _asks(4)) for i in range(8)]
            model.arrive()
        [stream.result() for stream in streams]
    begun = list(dict.fromkeys(tokens[0] for _, tokens in model.fed))
    assert begun == [A + i for i in range(8)]


def test_a_request_waits_for_room_and_is_not_overtaken() -> None:
    """Caches that do not fit beside the running one wait; a smaller request behind does not slip past."""
    model = echo()
    limits = EngineLimits(active=4, caches=CacheLimits(bytes=1000))
    with _closing(engine_of(model, limits, kv_bytes_per_token=1), model) as engine:
        with model.held():
            streams = [
                engine.submit([A] * 500, _asks(100)),
                engine.submit([B] * 500, _asks(100)),
                engine.submit([C], _asks(3)),
            ]
            model.arrive()
        assert [len(stream.result().token_ids) for stream in streams] == [100, 100, 3]
    owners = [tokens[0] for _, tokens in model.fed]
    assert owners.index(B) > max(at for at, owner in enumerate(owners) if owner == A)
    assert owners.index(C) > owners.index(B)


def test_many_readers() -> None:
    """Sixteen threads, each with its own question, on four places: everybody gets the own answer."""
    model = echo()
    results: dict[int, Generation] = {}
    with _closing(engine_of(model), model) as engine:

        def work(token: int) -> None:
            results[token] = engine.submit([token] * token, _asks(token % 7 + 1)).result()

        threads = [threading.Thread(target=work, args=(token,)) for token in range(30, 46)]
        [thread.start() for thread in threads]
        [thread.join(TIMEOUT_S) for thread in threads]
    assert {t: r.token_ids for t, r in results.items()} == {t: (t,) * (t % 7 + 1) for t in range(30, 46)}


def test_waiting_is_told() -> None:
    """`queue_s` grows while a request waits and is in its timings; its own work is counted apart."""
    model = echo()
    with _closing(engine_of(model, ONE_AT_A_TIME), model) as engine:
        with model.held():
            first, second = engine.submit([A], _asks(20)), engine.submit([B], _asks(2))
            model.arrive()
            waited_s = second.queue_s
            assert second.queue_s > waited_s > 0 and second.busy_s == 0
        done, other = second.result(), first.result()
        assert done.timings.queue_ms == second.queue_s * 1e3 > other.timings.queue_ms
        assert done.timings.queue_ms < done.timings.ttft_ms < done.timings.total_ms
        assert done.timings.busy_ms == second.busy_s * 1e3 < done.timings.total_ms


def test_a_closed_stream_has_no_result() -> None:
    """After `close` there are no pieces and no result; a whole answer keeps its."""
    model = echo()
    with _closing(engine_of(model), model) as engine:
        stream = engine.submit([A], _asks(50))
        next(stream)
        stream.close()
        stream.close()
        assert list(stream) == []
        with pytest.raises(InputError, match="closed before its end"):
            stream.result()
        with engine.submit([B], _asks(2)) as whole:
            assert len(list(whole)) == 2
        assert whole.result().token_ids == (B, B)
