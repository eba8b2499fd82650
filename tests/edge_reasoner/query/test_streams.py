"""Streams of a `Reasoner`: dropped, closed and cancelled ones free the model, wherever they are."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from support.watched_model import TIMEOUT_S, WatchedModel, echo, local_of

from edge_reasoner.chat.model import Cancellation, PulledStream
from edge_reasoner.errors import BackendError, InputError
from edge_reasoner.gate.policy import Policy
from edge_reasoner.preprocess.preprocessor import Preprocessor
from edge_reasoner.query.device import Device
from edge_reasoner.reasoner import Reasoner

LONG = "Z" * 200


@contextmanager
def _reasoner(model: WatchedModel, cloud=None, **options) -> Iterator[Reasoner]:
    preprocessor = Preprocessor(None, None, clock=time.perf_counter)
    with Reasoner(Device.of(local_of(model), preprocessor), cloud, **options) as reasoner:
        try:
            yield reasoner
        finally:
            model.release()


def _calls_of_a_short_answer(reasoner: Reasoner, model: WatchedModel) -> int:
    """Asks for two tokens after a prompt that is one chunk; how many calls there were meanwhile."""
    calls = len(model.fed)
    answer = reasoner.ask("Y", mode="local", max_tokens=2)
    assert answer.usage.completion_tokens == 2 and answer.usage.prompt_tokens <= 32
    return len(model.fed) - calls


def _dropped(streams: list) -> None:
    streams.clear()
    gc.collect()


ENDS: dict[str, Callable[[list], None]] = {
    "dropped": _dropped,
    "closed": lambda streams: streams[0].close(),
    "cancelled": lambda streams: streams[0].cancel(),
}


@pytest.mark.parametrize("end", list(ENDS))
@pytest.mark.parametrize("mode", ["local", "offline"])
def test_a_stream_that_ends_midway_costs_no_further_call(end: str, mode: str) -> None:
    """After the call under way the model is only called for the next question."""
    model = echo()
    with _reasoner(model, mode=mode) as reasoner:
        with model.held():
            streams = [reasoner.stream(LONG, max_tokens=100)]
            taken: list[str] = []
            reader = threading.Thread(target=lambda: taken.append(next(streams[0])))
            reader.start()
            model.arrive()
            while len(model.fed[-1][1]) > 1:
                model.step()
            # a call with the first token of the answer has begun: its piece was shown
            reader.join(TIMEOUT_S)
            assert len(taken) == 1
            ENDS[end](streams)
        assert _calls_of_a_short_answer(reasoner, model) == 2


def test_a_stream_that_was_never_read_costs_nothing() -> None:
    """Computing starts with the first piece; closing before gives no result."""
    model = echo()
    with _reasoner(model) as reasoner:
        stream = reasoner.stream(LONG)
        stream.close()
        del stream
        with pytest.raises(InputError, match="closed before its end"), reasoner.stream(LONG) as unread:
            unread.close()
            unread.result()
    assert not model.fed


def test_a_waiting_reader_is_woken() -> None:
    """`cancel` from another thread ends a reader that waits within a long prompt: a cancelled answer."""
    model = echo()
    with _reasoner(model, mode="local") as reasoner, model.held():
        stream = reasoner.stream(LONG, max_tokens=100)
        answers: list = []
        reader = threading.Thread(target=lambda: answers.append(stream.result()))
        reader.start()
        model.arrive()
        stream.cancel()
        model.release()
        reader.join(TIMEOUT_S)
        assert not reader.is_alive()
        assert (answers[0].finish_reason, answers[0].text) == ("cancelled", "")


class _Above:
    """A tier above that says a piece and then waits for the wish to end."""

    name, context_tokens = "above", None

    def __init__(self) -> None:
        self.begun, self.over = threading.Event(), threading.Event()
        self.outcome = ""

    def submit(self, request):
        cancellation = Cancellation()
        return PulledStream(self._pieces(cancellation), cancellation)

    def _pieces(self, cancellation):
        try:
            yield "hello"
            self.begun.set()
            while not cancellation.wanted:
                yield ""
            self.outcome = "cancelled"
            raise BackendError("cancelled")
        finally:
            self.outcome = self.outcome or "closed"
            self.over.set()

    def close(self) -> None:
        pass


def test_the_tier_above_is_freed_too() -> None:
    """A stream that is answered from above passes on that it was dropped, or cancelled by another thread."""
    above = _Above()
    with _reasoner(echo(), above, mode="cloud") as reasoner:
        stream = reasoner.stream(LONG)
        assert next(stream) == "hello"
        del stream
        gc.collect()
        assert above.over.is_set() and above.outcome == "closed"
    above = _Above()
    with _reasoner(echo(), above, mode="cloud") as reasoner:
        stream = reasoner.stream(LONG)

        def read() -> None:
            with pytest.raises(BackendError):
                list(stream)

        reader = threading.Thread(target=read)
        reader.start()
        assert above.begun.wait(TIMEOUT_S)
        stream.cancel()
        reader.join(TIMEOUT_S)
        assert not reader.is_alive() and above.outcome == "cancelled"


def test_a_hand_over_frees_the_model() -> None:
    """A local start that is given up for the tier above is not computed further while that one answers."""
    model, above = echo(), _Above()
    policy = Policy(early_tokens=3, threshold=0.999)
    with _reasoner(model, above, policy=policy) as reasoner:
        stream = reasoner.stream("Z", max_tokens=100)
        kinds = [next(stream).kind, next(stream).kind]
        assert kinds == ["handover", "cloud"]
        # one call may have been under way
        assert _calls_of_a_short_answer(reasoner, model) <= 3
