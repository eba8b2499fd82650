"""Ctrl-C, a service manager's stop and a closed terminal end a command in one way: cleaned up."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

#: what ends a command; a system without one of them does without
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
#: a shell hands on what the system has sent already: the second is the same stop, which cleans up undisturbed
_SAME_STOP_S = 2.0


class Interrupts:
    """While entered (on the main thread), those signals raise KeyboardInterrupt, and are noted.

    C extensions, and cleaning up, may turn the KeyboardInterrupt into another error on its way; the note
    tells. What the caller has set to be ignored (`nohup`) stays so, but for Ctrl-C. On another thread nothing
    changes.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._before: dict[signal.Signals, Any] = {}
        self._seen: tuple[signal.Signals, float] | None = None

    @property
    def seen(self) -> signal.Signals | None:
        """The signal that came first, if any did."""
        return None if self._seen is None else self._seen[0]

    @property
    def exit_status(self) -> int:
        """128 and the signal's number, as shells have it; a Ctrl-C's where no signal came."""
        return 128 + int(self.seen or signal.SIGINT)

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                number = getattr(signal, name, None)
                if number is None or (name != "SIGINT" and signal.getsignal(number) == signal.SIG_IGN):
                    continue
                self._before[number] = signal.signal(number, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # None: what was not set from Python cannot be set back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        now_s = self._clock()
        if self._seen is not None and number != signal.SIGINT and now_s - self._seen[1] < _SAME_STOP_S:
            return
        self._seen = (signal.Signals(number) if self._seen is None else self._seen[0]), now_s
        raise KeyboardInterrupt
