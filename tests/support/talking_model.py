"""A chat model whose answer is a table of steps: what a service does with any model can be shown with it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from edge_reasoner.chat.model import Cancellation, ChatRequest, PulledStream
from edge_reasoner.cloud.base import CloudResult


class TalkingModel:
    """Answers a request by the pieces that `script` yields; counts the answers under way."""

    name, context_tokens = "talking", 256

    def __init__(self, script: Callable[[ChatRequest, Cancellation], Iterator[str]]) -> None:
        self._script = script
        self.started, self.ended = threading.Semaphore(0), threading.Semaphore(0)
        self.closed = False

    def submit(self, request: ChatRequest) -> PulledStream:
        """See `ChatModel`."""
        cancellation = Cancellation()
        return PulledStream(self._pieces(request, cancellation), cancellation)

    def _pieces(self, request, cancellation):
        self.started.release()
        try:
            for piece in self._script(request, cancellation):
                yield piece
                if cancellation.wanted:
                    break
            return CloudResult("done", None, self.name, "stop", None)
        finally:
            self.ended.release()

    def close(self) -> None:
        """See `ChatModel`."""
        self.closed = True
