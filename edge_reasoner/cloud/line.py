"""One request's time: when it is over, and how to end it before."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

from edge_reasoner.errors import CloudProtocolError, CloudUnavailableError

_POLL_S = 0.05


class Line:
    """What one request holds of the network. One thread uses it; any may `cut` it.

    Whatever the user waits for is bounded by `left_s`; it holds the line meanwhile, with what wakes it up.
    """

    def __init__(self, end_s: float, clock: Callable[[], float]) -> None:
        """`end_s`: when it is over, on the clock."""
        self.clock = clock
        self._end_s = end_s
        self._lock = threading.Lock()
        self._was_cut = threading.Event()
        self._wake: Callable[[], None] | None = None
        self._left_bytes: int | None = None

    @property
    def over(self) -> bool:
        """Whether it was cut or its time has passed."""
        return self.left_s() <= 0

    @property
    def late(self) -> bool:
        """Whether its time has passed."""
        return self.clock() >= self._end_s

    def left_s(self) -> float:
        """Seconds left; 0 once it is over."""
        return 0.0 if self._was_cut.is_set() else max(0.0, self._end_s - self.clock())

    def cut(self) -> None:
        """Ends it: what is waited for ends at once, and nothing more begins. Idempotent."""
        with self._lock:
            self._was_cut.set()
            if self._wake is not None:
                self._wake()

    def wait(self, seconds: float) -> None:
        """Sleeps, unless it is cut."""
        self._was_cut.wait(seconds)

    @contextlib.contextmanager
    def holding(self, wake: Callable[[], None]) -> Iterator[None]:
        """While the user waits for something; `wake` ends that wait. It is called at once on a line that is
        cut already."""
        with self._lock:
            self._wake = wake
            if self._was_cut.is_set():
                wake()
        try:
            yield
        finally:
            with self._lock:
                self._wake = None

    @contextlib.contextmanager
    def until(self, end_s: float) -> Iterator[None]:
        """Meanwhile it is over earlier."""
        before_s, self._end_s = self._end_s, min(self._end_s, end_s)
        try:
            yield
        finally:
            self._end_s = before_s

    @contextlib.contextmanager
    def locked(self, lock: threading.Lock) -> Iterator[None]:
        """Holds a lock that another request may hold, which may have more time than this one.

        Raises CloudUnavailableError once it is over."""
        while not lock.acquire(timeout=_POLL_S):
            if self.over:
                raise CloudUnavailableError("another request did not come to an end in time")
        try:
            yield
        finally:
            lock.release()

    def allow(self, count: int) -> None:
        """From here on so many bytes may come."""
        self._left_bytes = count

    def spend(self, count: int) -> None:
        """So many bytes came. Raises CloudProtocolError beyond what is allowed."""
        if self._left_bytes is not None:
            self._left_bytes -= count
            if self._left_bytes < 0:
                raise CloudProtocolError("a reply that is far longer on the wire than what it says")
