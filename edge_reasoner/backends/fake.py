"""A deterministic decoder without weights: for tests of the engine and for dry runs of a service.

It honours the whole `DecoderModel` contract (capacity, rewind, fork, save, `num_logits`, buffer reuse), so
what works on it works on a real backend as far as the protocol goes. It loads no native library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge_reasoner.backends.base import KVCache, Step, TokenIds
from edge_reasoner.backends.saved_cache import CacheLayout, pack, unpack
from edge_reasoner.errors import BackendError, ContextOverflowError, InputError

#: Maps the tokens now in a cache to the token that the model would say next, or None for uniform logits.
Script = Callable[[Sequence[int]], int | None]

#: Logit of the scripted token; every other token has 0, so its probability is e**20 times theirs.
SCRIPTED_LOGIT = 20.0
#: Width of the hidden states: see `FakeDecoder`.
HIDDEN_SIZE = 2


class FakeKVCache:
    """The tokens of one sequence: see `KVCache`."""

    def __init__(self, model: FakeDecoder, context_tokens: int, tokens: Sequence[int] = ()) -> None:
        self._model = model
        self._context_tokens = context_tokens
        self.tokens = list(tokens)
        self._closed = False

    @property
    def context_tokens(self) -> int:
        """Capacity in tokens."""
        return self._context_tokens

    @property
    def length_tokens(self) -> int:
        """Tokens now in the cache."""
        return len(self.tokens)

    @property
    def model(self) -> FakeDecoder:
        """The model that made it."""
        return self._model

    def check_open(self) -> None:
        """Raises BackendError when the cache or its model was closed."""
        if self._closed or self._model.closed:
            raise BackendError("the KV cache is closed")

    def rewind(self, length_tokens: int) -> None:
        """See `KVCache.rewind`."""
        self.check_open()
        if not 0 <= length_tokens <= len(self.tokens):
            raise ValueError(f"cannot rewind {len(self.tokens)} tokens to {length_tokens}")
        del self.tokens[length_tokens:]

    def fork(self) -> FakeKVCache:
        """See `KVCache.fork`."""
        self.check_open()
        return FakeKVCache(self._model, self._context_tokens, self.tokens)

    def save(self) -> bytes:
        """See `KVCache.save`."""
        self.check_open()
        filled = np.array(self.tokens, np.int64).reshape(1, -1, 1)
        return pack(self._model.layout, self._context_tokens, [filled])

    def close(self) -> None:
        """See `KVCache.close`."""
        self._closed = True


class FakeDecoder:
    """Uniform logits, or a peak at the token that `script` names.

    `script` is None (always uniform), a mapping from the *absolute position* of the next token to its id
    (positions it does not name are uniform), or a function of all cached tokens. The hidden state of a
    position is [token id, 1]. `calls` counts `extend` calls and `fed_tokens` the tokens they carried: what an
    engine did not recompute shows there.
    """

    def __init__(
        self,
        vocab_size: int,
        context_tokens: int,
        script: Script | Mapping[int, int] | None = None,
    ) -> None:
        if vocab_size < 1 or context_tokens < 1:
            raise ValueError(
                f"vocab_size {vocab_size} and context_tokens {context_tokens} must be at least 1"
            )
        self._vocab_size = vocab_size
        self._context_tokens = context_tokens
        self._script = _as_function(script)
        self._logits: NDArray[np.float32] = np.zeros((1, vocab_size), np.float32)
        self.closed = False
        self.calls = 0
        self.fed_tokens = 0

    @property
    def context_tokens(self) -> int:
        """Longest context of a cache, in tokens."""
        return self._context_tokens

    @property
    def vocab_size(self) -> int:
        """Width of a logits row."""
        return self._vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""
        return HIDDEN_SIZE

    @property
    def layout(self) -> CacheLayout:
        """What its saved caches hold: token ids."""
        return CacheLayout(f"fake {self._vocab_size}", "int64", ((1, 1),))

    def new_cache(self, context_tokens: int | None = None) -> FakeKVCache:
        """See `DecoderModel.new_cache`."""
        self._check_open()
        wanted = self._context_tokens if context_tokens is None else context_tokens
        if not 1 <= wanted <= self._context_tokens:
            raise InputError(
                f"context of {wanted} tokens: 1 to {self._context_tokens} are possible with this model"
            )
        return FakeKVCache(self, wanted)

    def restore(self, saved: bytes) -> FakeKVCache:
        """See `DecoderModel.restore`."""
        self._check_open()
        context, (tokens,) = unpack(saved, self.layout, self._context_tokens)
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < self._vocab_size:
            raise InputError(f"saved KV cache: token ids must be in 0 … {self._vocab_size - 1}")
        return FakeKVCache(self, context, tokens.reshape(-1).tolist())

    def extend(
        self, cache: KVCache, token_ids: TokenIds, num_logits: int = 1, *, hidden: bool = False
    ) -> Step:
        """See `DecoderModel.extend`."""
        self._check_open()
        if not isinstance(cache, FakeKVCache) or cache.model is not self:
            raise ValueError("the cache belongs to another model")
        cache.check_open()
        count = int(token_ids.shape[0])
        if token_ids.ndim != 1 or not 1 <= num_logits <= count:
            raise ValueError(
                f"token_ids {token_ids.shape} must be [n], n ≥ 1, and 1 ≤ num_logits ({num_logits}) ≤ n"
            )
        if cache.length_tokens + count > cache.context_tokens:
            raise ContextOverflowError(
                f"{cache.length_tokens} + {count} tokens exceed the context of {cache.context_tokens} tokens"
            )
        if int(token_ids.min()) < 0 or int(token_ids.max()) >= self._vocab_size:
            raise InputError(f"token ids must be in 0 … {self._vocab_size - 1}")
        self.calls += 1
        self.fed_tokens += count
        rows = self._scripted_rows(cache.tokens, token_ids, num_logits)
        if not hidden:
            return Step(rows)
        states = np.stack([token_ids, np.ones_like(token_ids)], axis=-1).astype(np.float32)
        return Step(rows, states[-1], states.sum(0))

    def _scripted_rows(self, tokens: list[int], token_ids: TokenIds, num_logits: int) -> NDArray[np.float32]:
        if self._logits.shape[0] < num_logits:
            self._logits = np.zeros((num_logits, self._vocab_size), np.float32)
        rows = self._logits[:num_logits]
        rows[:] = 0.0
        first = token_ids.shape[0] - num_logits
        for index, token in enumerate(token_ids.tolist()):
            tokens.append(token)
            if index >= first and (said := self._script(tokens)) is not None:
                rows[index - first, said] = SCRIPTED_LOGIT
        return rows

    def close(self) -> None:
        """See `DecoderModel.close`."""
        self.closed = True

    def _check_open(self) -> None:
        if self.closed:
            raise BackendError("the model is closed")


def _as_function(script: Script | Mapping[int, int] | None) -> Script:
    if script is None:
        return lambda tokens: None
    if isinstance(script, Mapping):
        by_position = dict(script)
        return lambda tokens: by_position.get(len(tokens))
    return script
