"""This device's side of a Reasoner: its model and its preprocessor, opened when they are first needed."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from edge_reasoner.activation.store import Activation
from edge_reasoner.engine.local_model import LocalModel
from edge_reasoner.errors import BackendError
from edge_reasoner.machine.process import check_same_process
from edge_reasoner.preprocess.preprocessor import Preprocessor


@dataclass(frozen=True)
class DeviceParts:
    """What answers on the device. `power_w`: the board's draw under load as the exporter predicted it."""

    model: LocalModel
    preprocessor: Preprocessor
    activation: Activation | None = None
    power_w: float | None = None


class Device:
    """Opens its parts at the first `parts`, and closes them. Thread-safe.

    A query of mode "cloud" never asks for them, so that what is wrong with them cannot stop it.
    """

    def __init__(self, open_parts: Callable[[], DeviceParts]) -> None:
        """`open_parts` may raise: whoever needs the parts gets its error."""
        self._open_parts = open_parts
        self._opened: DeviceParts | None = None
        self._closed = False
        self._pid = os.getpid()
        self._lock = threading.Lock()

    @classmethod
    def of(cls, model: LocalModel, preprocessor: Preprocessor) -> Device:
        """A device whose parts are open already."""
        device = cls(lambda: DeviceParts(model, preprocessor))
        _ = device.parts
        return device

    @property
    def opened(self) -> DeviceParts | None:
        """The parts, if something has needed them already."""
        return self._opened

    @property
    def parts(self) -> DeviceParts:
        """The parts, opened the first time. Raises what that raises, and BackendError once closed."""
        if self._opened is None:
            check_same_process(self._pid, "the reasoner was opened")  # the lock may be held for ever
            with self._lock:
                if self._closed:
                    raise BackendError("the model is closed")
                if self._opened is None:
                    self._opened = self._open_parts()
        return self._opened

    def close(self) -> None:
        """Releases what was opened. Idempotent."""
        if self._pid == os.getpid():
            with self._lock:
                self._closed = True
        if self._opened is not None:
            self._opened.model.close()
            self._opened.preprocessor.close()
