"""A decoder whose calls a test can watch and hold up: no test of the engine needs to sleep."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

from support.local_models import TEMPLATE
from support.tiny_tokenizers import byte_level, wrap

from edge_reasoner.backends.base import DecoderModel, KVCache, Step, TokenIds
from edge_reasoner.backends.fake import FakeDecoder
from edge_reasoner.contract.template.render import ChatTemplate
from edge_reasoner.engine.local_model import LocalModel
from edge_reasoner.engine.loop import Engine, EngineLimits

#: a test that hangs fails after this time; nothing is proven by it
TIMEOUT_S = 60.0


class WatchedModel:
    """Passes all on to `model`. `fed` has the cache and the tokens of every call that began."""

    def __init__(self, model: DecoderModel) -> None:
        self.model = model
        self.fed: list[tuple[KVCache, tuple[int, ...]]] = []
        self.caches = 0
        #: called with the tokens before each call; may raise
        self.before: Callable[[Sequence[int]], None] = lambda tokens: None
        self._open = True
        self._arrived = threading.Semaphore(0)
        self._allowed = threading.Semaphore(0)

    context_tokens = property(lambda self: self.model.context_tokens)
    vocab_size = property(lambda self: self.model.vocab_size)
    hidden_size = property(lambda self: self.model.hidden_size)
    closed = False

    def new_cache(self, context_tokens: int | None = None) -> KVCache:
        self.caches += 1
        return self.model.new_cache(context_tokens)

    def restore(self, saved: bytes) -> KVCache:
        return self.model.restore(saved)

    def extend(
        self, cache: KVCache, token_ids: TokenIds, num_logits: int = 1, *, hidden: bool = False
    ) -> Step:
        tokens = tuple(token_ids.tolist())
        self.fed.append((cache, tokens))
        if not self._open:
            self._arrived.release()
            assert self._allowed.acquire(timeout=TIMEOUT_S), "the test never let the call go on"
        self.before(tokens)
        return self.model.extend(cache, token_ids, num_logits, hidden=hidden)

    def close(self) -> None:
        self.closed = True
        self.model.close()

    def calls_with(self, token: int) -> int:
        """Calls so far that carried `token`."""
        return sum(token in tokens for _, tokens in self.fed)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, every call stops at its beginning until `step` or the end."""
        self._arrived, self._allowed = threading.Semaphore(0), threading.Semaphore(0)
        self._open = False
        try:
            yield
        finally:
            self.release()

    def arrive(self) -> None:
        """Waits until a call has begun, and leaves it there."""
        assert self._arrived.acquire(timeout=TIMEOUT_S), "the model was not called"

    def step(self, calls: int = 1) -> None:
        """Lets so many calls that have begun go on; the next has then begun too, and is left there."""
        for _ in range(calls):
            self._allowed.release()
            self.arrive()

    def release(self) -> None:
        """Lets all calls go on."""
        self._open = True
        self._allowed.release(1_000_000)


def echo(context_tokens: int = 2048, vocab_size: int = 400) -> WatchedModel:
    """Says the prompt's last token again and again, so that a token tells whose a call was."""
    return WatchedModel(FakeDecoder(vocab_size, context_tokens, lambda tokens: tokens[-1]))


def engine_of(
    model: DecoderModel,
    limits: EngineLimits | None = None,
    *,
    eos: Sequence[int] = (),
    kv_bytes_per_token: int = 0,
) -> Engine:
    """An engine with a byte-level tokenizer and a clock that counts."""
    ticks = itertools.count()
    return Engine(
        model,
        wrap(byte_level()),
        name="watched",
        eos_token_ids=eos,
        clock=lambda: next(ticks) * 1e-3,
        limits=limits,
        kv_bytes_per_token=kv_bytes_per_token,
    )


def local_of(model: DecoderModel, limits: EngineLimits | None = None) -> LocalModel:
    """A chat model over `model` with the template of the scripted ones."""
    engine = engine_of(model, limits)
    chat = ChatTemplate(TEMPLATE, special_tokens={}, clock=time.monotonic, now=datetime.now)
    return LocalModel(engine, chat, bos_token_id=None)
