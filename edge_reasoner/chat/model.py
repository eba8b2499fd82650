"""`ChatModel`: the one protocol of the local model, the cloud client, the server's model and `Reasoner`.

Tiers nest: whatever answers a chat takes a `ChatRequest` and gives a `ChatStream`, so a gateway is a
`Reasoner` behind the protocol, and a `Reasoner` may have another one as its cloud.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic, Literal, Protocol, TypeVar

from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.contract.template.render import Message
from edge_reasoner.errors import InputError
from edge_reasoner.machine.process import check_same_process

#: How a local answer ends; endpoints have further words of their own.
FinishReason = Literal["stop", "length", "context", "cancelled"]


@dataclass(frozen=True)
class Usage:
    """Tokens of one query: `cached_tokens` of the prompt were in the KV cache already."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class ChatRequest:
    """What is asked: a chat (`messages`), or a raw `text` to be continued as it is. Raises InputError on
    both.

    `context_tokens` lowers the model's own limit for this request. `extra` adds fields to an endpoint's
    request as they are; a local model ignores it. `hidden` asks a local model for the hidden states of prompt
    and answer; others ignore it.
    """

    messages: tuple[Message, ...] = ()
    text: str | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    context_tokens: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    hidden: bool = False

    def __post_init__(self) -> None:
        if (self.text is None) == (not self.messages):
            raise InputError("a request needs either messages or a text, and not both")


_Made = TypeVar("_Made", bound="ChatPiece")


class ChatPiece(str):
    """A piece of an answer: prints as its text, which may be empty. `thought`: what a reasoning model thought
    meanwhile; it is no part of the text."""

    thought: str

    __slots__ = ("thought",)

    def __new__(cls: type[_Made], text: str, thought: str = "") -> _Made:
        """Makes a piece."""
        piece = super().__new__(cls, text)
        piece.thought = thought
        return piece


def thought_of(piece: str) -> str:
    """What was thought meanwhile; "" where the piece does not say."""
    return piece.thought if isinstance(piece, ChatPiece) else ""


class ChatResult(Protocol):
    """A finished answer. `thinking`: what a reasoning model wrote before it, or None. `usage`: None where
    nobody counted."""

    @property
    def text(self) -> str: ...
    @property
    def thinking(self) -> str | None: ...
    @property
    def model(self) -> str: ...
    @property
    def finish_reason(self) -> str: ...
    @property
    def usage(self) -> Usage | None: ...


PieceT_co = TypeVar("PieceT_co", bound=str, covariant=True)
ResultT_co = TypeVar("ResultT_co", bound=ChatResult, covariant=True)


class ChatStream(Protocol[PieceT_co, ResultT_co]):
    """An answer under way. Iterating gives its pieces (str, or a subclass that says more; some are empty),
    each once. Thinking comes with them as `ChatPiece.thought`; what the result calls `thinking` counts.

    Errors of the model are raised by the iteration and by `result`. A stream that is dropped, closed or
    cancelled frees the model within one token.
    """

    def __iter__(self) -> Iterator[PieceT_co]: ...

    def __next__(self) -> PieceT_co: ...

    def result(self) -> ResultT_co:
        """Takes what is left of the pieces and gives the whole answer."""

    def cancel(self) -> None:
        """Asks for the end; the stream then ends with finish reason "cancelled". Any thread may call it."""

    def close(self) -> None:
        """Gives up what is left. Idempotent."""


class ChatModel(Protocol):
    """Anything that answers chats. Thread-safe."""

    @property
    def name(self) -> str:
        """Name that clients ask for."""

    @property
    def context_tokens(self) -> int | None:
        """Longest prompt and answer together, in tokens; None where it is not known."""

    def submit(self, request: ChatRequest) -> ChatStream[str, ChatResult]:
        """Starts an answer. Raises InputError and ContextOverflowError at once; the rest from the stream."""

    def close(self) -> None:
        """Releases the model or its connections."""


PieceT = TypeVar("PieceT", bound=str)
ResultT = TypeVar("ResultT", bound=ChatResult)


class _Cancellable(Protocol):
    def cancel(self) -> None: ...


class Cancellation:
    """A wish to end an answer: any thread may utter it, whoever makes the answer looks at `wanted`.

    A stream that is read in turn (a tier below) is `follow`ed: the wish is passed on to it at once, so that a
    reader that waits inside it wakes up.
    """

    def __init__(self) -> None:
        self.wanted = False
        self._followed: _Cancellable | None = None

    def cancel(self) -> None:
        """Utters the wish. Idempotent."""
        self.wanted = True
        followed = self._followed
        if followed is not None:
            followed.cancel()

    def follow(self, stream: _Cancellable) -> None:
        """Passes the wish on to `stream`, also if it was uttered before; replaces the stream before."""
        self._followed = stream
        if self.wanted:
            stream.cancel()


class PulledStream(Generic[PieceT, ResultT]):
    """A `ChatStream` over a generator of pieces that returns the result; it runs in its reader's thread.

    Any thread may read it: one is inside the generator, the others wait for their turn, and each piece is
    given once. An error ends the stream for all of them.

    The generator gets the same `cancellation` and looks at it between pieces. It must not refer to the stream
    itself: a dropped stream is then closed at once.
    """

    def __init__(
        self, pieces: Generator[PieceT, None, ResultT], cancellation: Cancellation | None = None
    ) -> None:
        self._pieces = pieces
        self._cancellation = cancellation or Cancellation()
        self._pid = os.getpid()
        # Guards the generator and its outcome. Re-entrant: a signal's handler may close what it interrupts.
        self._turn = threading.RLock()
        self._result: ResultT | None = None
        self._error: Exception | None = None

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancellation.wanted

    def __iter__(self) -> Iterator[PieceT]:
        return self

    def __next__(self) -> PieceT:
        check_same_process(self._pid, "the stream was begun")
        with self._turn:
            if self._running():
                raise InputError("the stream is being read already, by what this thread was interrupted in")
            if self._error is not None:
                raise self._error
            try:
                return next(self._pieces)
            except StopIteration as end:
                if self._result is None and end.value is not None:
                    self._result = end.value
                raise StopIteration from None
            except Exception as error:
                self._error = error
                raise

    def result(self) -> ResultT:
        """See `ChatStream`. Raises InputError if the stream was closed before its end."""
        for _ in self:
            pass
        if self._result is None:
            raise InputError("the stream was closed before its end: it has no result")
        return self._result

    def cancel(self) -> None:
        """See `ChatStream`."""
        self._cancellation.cancel()

    def close(self) -> None:
        """See `ChatStream`. Where another thread is inside, the answer is cancelled instead."""
        if not self._turn.acquire(blocking=False):
            self._cancellation.cancel()
            return
        try:
            if self._running():
                self._cancellation.cancel()
            else:
                self._pieces.close()
        finally:
            self._turn.release()

    def _running(self) -> bool:
        return inspect.getgeneratorstate(self._pieces) == inspect.GEN_RUNNING

    def __enter__(self) -> PulledStream[PieceT, ResultT]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
