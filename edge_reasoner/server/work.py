"""Runs a chat model's generations one after another in a worker thread, for asynchronous callers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.contract.template.render import Message
from edge_reasoner.engine.generate import GeneratedToken, Generation, TokenStream
from edge_reasoner.errors import BackendError
from edge_reasoner.server.protocol import RequestError

#: tokens that a slow reader may leave unread before the generation waits for it
_UNREAD_TOKENS = 256
_RETRY_AFTER_S = 2
#: a reader that lets the buffer stay full for so long is given up
_STALL_S = 30


class ChatModel(Protocol):
    """What the server serves. Calls come from one thread at a time."""

    @property
    def name(self) -> str:
        """Name that clients ask for."""

    @property
    def context_tokens(self) -> int:
        """Longest prompt and answer together, in tokens."""

    def generate(
        self,
        prompt: str | Sequence[Message],
        params: SamplingParams,
        *,
        cancelled: Callable[[], bool],
        context_tokens: int | None = None,
    ) -> TokenStream:
        """Answers messages, or continues a text. Raises EdgeReasonerError."""

    def close(self) -> None:
        """Releases the model."""


@dataclass(frozen=True)
class Job:
    """One generation to be run."""

    prompt: str | Sequence[Message]
    params: SamplingParams
    context_tokens: int | None


class Worker:
    """One model, one thread, a bounded queue."""

    def __init__(self, model: ChatModel, *, max_waiting: int) -> None:
        """`max_waiting`: jobs beyond the running one; more are refused with 429."""
        self.model = model
        self._max_jobs = max_waiting + 1
        self._jobs = 0
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="edge-reasoner-model")

    def close(self) -> None:
        """Waits for the running job, drops the others, releases the model."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.model.close()

    def submit(self, job: Job) -> AsyncGenerator[GeneratedToken | Generation, None]:
        """Queues a job; yields its tokens and, last, its `Generation`.

        Raises RequestError(429) at once when the queue is full. Closing the generator cancels the job.
        """
        with self._lock:
            if self._jobs >= self._max_jobs:
                raise RequestError(
                    429, "the queue is full; try again later", "rate_limit_error", _RETRY_AFTER_S
                )
            self._jobs += 1
        loop = asyncio.get_running_loop()
        items: asyncio.Queue[Any] = asyncio.Queue()
        cancel = threading.Event()
        unread = threading.Semaphore(_UNREAD_TOKENS)

        def post(item: Any) -> None:
            if not cancel.is_set():
                loop.call_soon_threadsafe(items.put_nowait, item)

        self._pool.submit(self._run, job, post, cancel, unread)
        return _read(items, cancel, unread)

    def _run(
        self, job: Job, post: Callable[[Any], None], cancel: threading.Event, unread: threading.Semaphore
    ) -> None:
        try:
            if cancel.is_set():
                return
            stream = self.model.generate(
                job.prompt, job.params, cancelled=cancel.is_set, context_tokens=job.context_tokens
            )
            while True:
                try:
                    token = next(stream)
                except StopIteration as end:
                    post(end.value)
                    return
                if not _acquire(unread, cancel):
                    stream.close()
                    post(BackendError(f"the client read nothing for {_STALL_S} s"))
                    return
                post(token)
        except Exception as error:  # noqa: BLE001  # the worker thread's edge: the request gets the error
            post(error)
        finally:
            with self._lock:
                self._jobs -= 1


def _acquire(unread: threading.Semaphore, cancel: threading.Event) -> bool:
    # A client that stops reading must not keep the model from the others.
    return any(unread.acquire(timeout=0.1) for _ in range(_STALL_S * 10) if not cancel.is_set())


async def _read(
    items: asyncio.Queue[Any], cancel: threading.Event, unread: threading.Semaphore
) -> AsyncGenerator[GeneratedToken | Generation, None]:
    try:
        while True:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Generation):
                return
            unread.release()
    finally:
        cancel.set()
