"""The scheduler: one thread owns the model, callers get streams.

Requests wait in a bounded queue. Up to `EngineLimits.active` of them are answered at once, each with a cache
of its own and one model call a turn, so a long prompt (fed in chunks) or a long answer holds nobody up. A
reader is never waited for: pieces are kept until they are read, at most as many as the answer may have
tokens, and a finished answer gives its place away whether it was read or not. A stream that is cancelled,
closed or dropped ends before the model's next call for it.

While nothing is asked, prompts that are expected to come are fed ahead, a chunk a turn; a request waits for
one such chunk at most.

No lock is held while a model call runs or a reader's code does.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

from edge_reasoner.backends.base import DecoderModel
from edge_reasoner.chat.checks import check_integer, check_is
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.engine.generate import (
    Decoder,
    DecodeRequest,
    Decoding,
    Generation,
    Stopwatch,
    TokenPiece,
)
from edge_reasoner.engine.prefix import CachedSequence, CacheLimits, CachePool
from edge_reasoner.engine.sampling import Scratch
from edge_reasoner.engine.tokens import TextTokenizer
from edge_reasoner.errors import BackendError, ContextOverflowError, InputError, OverloadedError
from edge_reasoner.machine.process import check_same_process

#: how long the end of the process waits for the model call under way
_EXIT_WAIT_S = 10.0
#: answers at once: each has a cache of its own
_MOST_ACTIVE = 1024
#: prompts that are fed ahead at once; of more, the oldest are forgotten
_AHEAD_PROMPTS = 4
#: tokens of a prompt's end that show whether its template opened a block of thinking
_TAIL_TOKENS = 48


@dataclass(frozen=True)
class EngineLimits:
    """How much an engine takes on. Raises InputError.

    active: answers computed at once, each with a cache. waiting: requests that may queue beyond them; more
    are refused. caches: the caches that are kept, those in use among them.
    """

    active: int = 4
    waiting: int = 256
    caches: CacheLimits = field(default_factory=CacheLimits)

    def __post_init__(self) -> None:
        check_integer("active", self.active, 1, _MOST_ACTIVE)
        check_integer("waiting", self.waiting, 0)
        check_is("caches", self.caches, CacheLimits, "CacheLimits")


class _Job:
    """One request between its reader and the loop. `ready` guards pieces and outcome."""

    def __init__(self, request: DecodeRequest, watch: Stopwatch) -> None:
        self.request = request
        self.watch = watch
        self.ready = threading.Condition()
        self.pieces: deque[TokenPiece] = deque()
        self.outcome: Generation | BaseException | None = None
        # A plain flag: it is also set by the garbage collector, which may interrupt the holder of any lock.
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True

    def show(self, piece: TokenPiece) -> None:
        with self.ready:
            self.pieces.append(piece)
            self.ready.notify_all()

    def finish(self, outcome: Generation | BaseException) -> None:
        with self.ready:
            self.outcome = outcome
            self.ready.notify_all()


@dataclass(eq=False)
class _Active:
    job: _Job
    sequence: CachedSequence
    decoding: Decoding
    turns: Iterator[None]


@dataclass(frozen=True)
class _Ahead:
    """The beginning of a prompt that is expected."""

    prompt: tuple[int, ...]
    hidden: bool


class TokenStream:
    """An answer under way in the engine: see `ChatStream`. Any thread may read it, each piece is given once.

    A dropped stream is cancelled. Keeps its engine open until it is dropped itself.
    """

    def __init__(self, job: _Job, owner: Engine, pid: int) -> None:
        self._job = job
        self._owner = owner
        self._pid = pid
        self._given_up = False
        self._dropped = weakref.finalize(self, job.cancel)
        self._dropped.atexit = False

    @property
    def busy_s(self) -> float:
        """Seconds of model work so far."""
        return self._job.watch.busy_s

    @property
    def queue_s(self) -> float:
        """Seconds that it waited for its first turn; until now, if that has not come."""
        queue_s = self._job.watch.queue_s
        return self._job.watch.elapsed_s() if queue_s is None else queue_s

    def __iter__(self) -> Iterator[TokenPiece]:
        return self

    def __next__(self) -> TokenPiece:
        check_same_process(self._pid)
        job = self._job
        with job.ready:
            while not self._given_up and not job.pieces and job.outcome is None:
                job.ready.wait()
            if self._given_up:
                raise StopIteration
            if job.pieces:
                return job.pieces.popleft()
            outcome = job.outcome
        if isinstance(outcome, BaseException):
            raise outcome
        raise StopIteration

    def result(self) -> Generation:
        """Takes what is left of the pieces and gives the whole answer. Raises BackendError, and InputError if
        the stream was closed before its end."""
        check_same_process(self._pid)
        job = self._job
        with job.ready:
            while not self._given_up and job.outcome is None:
                job.ready.wait()
            outcome = job.outcome
            if not self._given_up:
                job.pieces.clear()
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is not None and not self._given_up:
            return outcome
        raise InputError("the stream was closed before its end: it has no result")

    def cancel(self) -> None:
        """See `ChatStream`: what is computed until then can still be read."""
        self._job.cancel()

    def close(self) -> None:
        """See `ChatStream`."""
        self._job.cancel()
        if self._pid != os.getpid():
            return
        with self._job.ready:
            if self._job.outcome is None or self._job.pieces:
                self._given_up = True
                self._job.pieces.clear()
                self._job.ready.notify_all()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Engine:
    """One decoder model and the loop that serves it. Thread-safe; the thread starts with the first request.

    Close it; one that is dropped ends its thread too. A forked child cannot use it (BackendError).
    """

    def __init__(
        self,
        model: DecoderModel,
        tokenizer: TextTokenizer,
        *,
        name: str,
        eos_token_ids: Sequence[int],
        clock: Callable[[], float],
        limits: EngineLimits | None = None,
        kv_bytes_per_token: int = 0,
        context_tokens: int | None = None,
    ) -> None:
        """`clock` returns monotonic seconds; `eos_token_ids` end an answer and are not part of its text.
        `context_tokens` None: the model's own. Raises InputError for a context that the model cannot have.
        `kv_bytes_per_token`: of one cache, for `limits.caches.bytes`. The engine closes `model`."""
        self.name = name
        self.tokenizer = tokenizer
        self.limits = limits or EngineLimits()
        self._model = model
        self._clock = clock
        self._pid = os.getpid()
        self._context_tokens = model.context_tokens if context_tokens is None else context_tokens
        if not 1 <= self._context_tokens <= model.context_tokens:
            raise InputError(
                f"context_tokens={context_tokens}: 1 to {model.context_tokens} are possible with this model"
            )
        pool = CachePool(model, self.limits.caches, kv_bytes_per_token, self._context_tokens)
        # The loop does not know the engine, so that an engine which nobody holds can end it.
        decoder = Decoder(model, tokenizer, name, frozenset(eos_token_ids), Scratch(model.vocab_size))
        self._loop = _Loop(decoder, pool, self.limits)
        self._dropped = weakref.finalize(self, self._loop.stop)
        self._dropped.atexit = False

    @property
    def context_tokens(self) -> int:
        """Longest prompt and answer together, in tokens."""
        return self._context_tokens

    def limit_tokens(self, context_tokens: int | None = None) -> int:
        """The context limit in force for a request that lowers it to `context_tokens`."""
        return min(context_tokens or self.context_tokens, self.context_tokens)

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        context_tokens: int | None = None,
        hidden: bool = False,
        chat: bool = False,
    ) -> TokenStream:
        """Starts an answer to `prompt_ids`. `context_tokens` lowers the model's own limit; `hidden` asks for
        the hidden states; `chat` tells thinking and answer apart.

        Raises InputError, ContextOverflowError, OverloadedError (the queue is full) and BackendError (closed)
        at once, before any work.
        """
        prompt = tuple(int(token) for token in prompt_ids)
        if not prompt:
            raise InputError("the prompt is empty: at least one token is needed")
        if min(prompt) < 0 or max(prompt) >= self._model.vocab_size:
            raise InputError(f"prompt: token ids must be from 0 to {self._model.vocab_size - 1}")
        limit = self.limit_tokens(context_tokens)
        if len(prompt) + 1 > limit:
            raise ContextOverflowError(
                f"the prompt has {len(prompt)} tokens; at most {limit - 1} fit a context of {limit} tokens"
            )
        check_same_process(self._pid)
        watch = Stopwatch(self._clock, self._clock())
        tail = self.tokenizer.decode(prompt[-_TAIL_TOKENS:], skip_special=False) if chat else None
        job = _Job(DecodeRequest(prompt, params, limit, hidden, tail), watch)
        self._loop.submit(job)
        return TokenStream(job, self, self._pid)

    def prefill_ahead(self, prompt_ids: Sequence[int], *, hidden: bool = False) -> None:
        """Feeds what a coming prompt is expected to begin with, while nothing else is asked; never waits.

        Only whole chunks are fed, since only these can be reused. Errors are those of the prompt that comes
        later, and what does not fit or cannot be a prompt is left alone. Work that nobody needs in the end
        has cost energy: call it where the conversation goes on more often than not.
        """
        prompt = tuple(int(token) for token in prompt_ids)[: self._context_tokens]
        if prompt and min(prompt) >= 0 and max(prompt) < self._model.vocab_size and self._pid == os.getpid():
            self._loop.prefill_ahead(_Ahead(prompt, hidden))

    def close(self) -> None:
        """Ends the thread after its present model call, fails what is unfinished, releases the model."""
        if self._pid == os.getpid():
            self._loop.stop()
            self._loop.join(None)


class _Loop:
    """The thread. `changed` guards queue, count and flag; all else is the thread's own."""

    def __init__(self, decoder: Decoder, pool: CachePool, limits: EngineLimits) -> None:
        self._decoder = decoder
        self._pool = pool
        self._limits = limits
        self._pid = os.getpid()
        self._changed = threading.Condition(threading.RLock())  # re-entered by the garbage collector
        self._waiting: deque[_Job] = deque()
        self._unfinished = 0
        self._stopping = False
        self._active: list[_Active] = []
        self._ahead: deque[_Ahead] = deque(maxlen=_AHEAD_PROMPTS)
        self._thread: threading.Thread | None = None

    def submit(self, job: _Job) -> None:
        """Queues a job. Raises OverloadedError, BackendError."""
        with self._changed:
            if self._stopping:
                raise BackendError("the model is closed")
            given_up = sum(other.cancelled for other in self._waiting)
            if self._unfinished - given_up >= self._limits.waiting + self._limits.active:
                raise OverloadedError(
                    f"{self._limits.active} requests are being answered and {self._limits.waiting} wait"
                    " already; try again later"
                )
            if self._thread is None:
                self._thread = self._started()
            self._waiting.append(job)
            self._unfinished += 1
            self._changed.notify_all()

    def prefill_ahead(self, ahead: _Ahead) -> None:
        """Queues it, if the loop runs."""
        with self._changed:
            if self._thread is not None and not self._stopping:
                self._ahead.append(ahead)
                self._changed.notify_all()

    def _started(self) -> threading.Thread:
        thread = threading.Thread(target=self._run, name="edge-reasoner-engine", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise BackendError(f"no thread for the model's work could be started: {error}") from error
        # a daemon thread inside native code would bring the interpreter down at its end
        atexit.register(self._at_exit)
        return thread

    def stop(self) -> None:
        """Asks the thread to end. Never waits: the garbage collector may call it, in any thread."""
        if self._pid != os.getpid():
            return  # after a fork there is no thread, and its locks may be held for ever
        with self._changed:
            if self._stopping:
                return
            self._stopping = True
            self._changed.notify_all()
            if self._thread is None:
                self._decoder.model.close()

    def join(self, timeout_s: float | None) -> None:
        """Waits for the end of the thread."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_s)

    def _at_exit(self) -> None:
        self.stop()
        if self._pid == os.getpid():
            self.join(_EXIT_WAIT_S)

    def _run(self) -> None:
        try:
            while self._round():
                for active in tuple(self._active):
                    self._turn(active)
                if not self._active:
                    self._turn_ahead()
        finally:
            self._end()

    def _round(self) -> bool:
        """Waits for work and admits what there is room for; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or self._waiting or self._active or self._ahead)
            if self._stopping:
                return False
            given_up = [job for job in self._waiting if job.cancelled]
            for job in given_up:
                self._waiting.remove(job)
        for job in given_up:
            self._finish(job, self._decoder.cancelled(job.request, job.watch))
        while len(self._active) < self._limits.active and self._waiting and self._admit(self._waiting[0]):
            with self._changed:
                self._waiting.popleft()
        return True

    def _admit(self, job: _Job) -> bool:
        """Gives the job a cache; False if it has to wait for one."""
        request = job.request
        total_tokens = len(request.prompt) + request.budget_tokens
        try:
            sequence = self._pool.take(request.prompt, total_tokens, hidden=request.hidden)
        except Exception as error:  # noqa: BLE001  # the thread's edge: the request gets the error
            self._finish(job, error)
            return True
        if sequence is None:
            return False
        decoding = Decoding(request, sequence, self._decoder, job.watch)
        self._active.append(_Active(job, sequence, decoding, decoding.turns(job)))
        return True

    def _turn(self, active: _Active) -> None:
        """One model call of one answer; whatever goes wrong is that answer's alone."""
        outcome: Generation | Exception | None
        try:
            if not next(active.turns, True):
                return
            outcome = active.decoding.generation
        except Exception as error:  # noqa: BLE001  # the thread's edge: the request gets the error
            outcome = error
        self._active.remove(active)
        if isinstance(outcome, Generation):
            self._pool.give_back(active.sequence)
            self._finish(active.job, outcome)
        else:
            # nobody knows what the cache holds now
            self._pool.drop(active.sequence)
            self._finish(active.job, outcome or BackendError("the answer ended without a result"))

    def _turn_ahead(self) -> None:
        """One chunk of what is expected, unless something is asked."""
        with self._changed:
            if self._stopping or self._waiting or not self._ahead:
                return
            ahead = self._ahead.popleft()
        try:
            unfinished = self._decoder.feed_ahead(self._pool, ahead.prompt, hidden=ahead.hidden)
        except Exception:  # noqa: BLE001  # the thread's edge: the prompt will meet it again, and tell who asks
            return
        with self._changed:
            if unfinished and len(self._ahead) < _AHEAD_PROMPTS:
                self._ahead.append(ahead)

    def _finish(self, job: _Job, outcome: Generation | Exception) -> None:
        with self._changed:
            self._unfinished -= 1
        job.finish(outcome)

    def _end(self) -> None:
        with self._changed:
            self._stopping = True
            jobs = [*self._waiting, *(active.job for active in self._active)]
            self._waiting.clear()
            self._ahead.clear()
        self._active.clear()
        for job in jobs:
            self._finish(job, BackendError("the model was closed before the answer was done"))
        self._pool.close()
        self._decoder.model.close()
        atexit.unregister(self._at_exit)
