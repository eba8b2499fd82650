"""What one query took, measured while it is under way."""

from __future__ import annotations

from collections.abc import Callable

from edge_reasoner.query.answer import Timings


class Meter:
    """Belongs to one query. `clock` returns monotonic seconds; the query begins when the meter is made."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start_s = clock()
        self._first_token_s: float | None = None
        self.preprocess_ms = 0.0
        self.queue_ms = 0.0
        self.local_busy_s = 0.0

    def token(self) -> None:
        """A token of the answer is there; the first one counts."""
        if self._first_token_s is None:
            self._first_token_s = self._clock()

    def count(self, *, thinking: bool) -> None:
        """A token of the local model is there; one of its thinking says that so were all before it."""
        if thinking:
            self.begin_anew()
        else:
            self.token()

    def begin_anew(self) -> None:
        """Somebody else answers from here on: what was made so far is not the answer."""
        self._first_token_s = None

    def local(self, queue_s: float, busy_s: float) -> None:
        """An attempt of the local model: seconds in its queue, and of its work."""
        self.queue_ms += queue_s * 1e3
        self.local_busy_s += busy_s

    def timings(self, prefill_tps: float | None = None, decode_tps: float | None = None) -> Timings:
        """All of it, up to now."""
        end_s = self._clock()
        first_s = end_s if self._first_token_s is None else self._first_token_s
        return Timings(
            queue_ms=self.queue_ms,
            preprocess_ms=self.preprocess_ms,
            ttft_ms=(first_s - self._start_s) * 1e3,
            total_ms=(end_s - self._start_s) * 1e3,
            prefill_tps=prefill_tps,
            decode_tps=decode_tps,
        )
