"""What a backend offers: a decoder session with a KV cache, and an encoder session.

A new backend is one file that implements these protocols plus one row in `backends/__init__.py`; the shared
conformance test in `tests/backends/` runs against every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]
TokenIds = NDArray[np.int64]


@dataclass(frozen=True)
class Step:
    """What one `extend` gave. Views that are valid until the model's next call.

    `logits`: float32 [num_logits, vocab], the last positions'. With `hidden=True` also `last_hidden`, float32
    [hidden]: the final norm's output at the last position, and `hidden_sum`, float32 [hidden]: the same
    summed over the tokens of this call (the caller divides by their number: mean pooling over any span
    costs no second pass).
    """

    logits: Logits
    last_hidden: NDArray[np.float32] | None = None
    hidden_sum: NDArray[np.float32] | None = None


class KVCache(Protocol):
    """One sequence's state. Not thread-safe; belongs to the model that made it, and holds no weights."""

    @property
    def context_tokens(self) -> int:
        """Capacity in tokens."""

    @property
    def length_tokens(self) -> int:
        """Tokens now in the cache."""

    def rewind(self, length_tokens: int) -> None:
        """Forgets everything after the first `length_tokens` tokens (0 = start afresh). O(1)."""

    def fork(self) -> KVCache:
        """A second cache with the same tokens, bit for bit; costs only what is filled."""

    def save(self) -> bytes:
        """The filled part as bytes, with a header that names shape and dtype; `restore` of the model reads
        it."""

    def close(self) -> None:
        """Releases the memory. Idempotent; further calls are an error."""


class DecoderModel(Protocol):
    """One causal LM: its graph and weights, shared by any number of caches.

    Opening caches is thread-safe; calls of `extend` take turns (the engine has one thread for them).
    """

    @property
    def context_tokens(self) -> int:
        """Longest context of a cache, in tokens."""

    @property
    def vocab_size(self) -> int:
        """Width of a logits row."""

    @property
    def hidden_size(self) -> int | None:
        """Width of the hidden states, or None where the graph does not give them."""

    def new_cache(self, context_tokens: int | None = None) -> KVCache:
        """An empty cache (None: the model's own limit). Memory is touched only as it fills.

        Raises InputError when the model cannot have such a context, BackendError when memory is short.
        """

    def restore(self, saved: bytes) -> KVCache:
        """A cache from `KVCache.save`, which is untrusted input. Raises InputError unless it fits this
        model."""

    def extend(
        self, cache: KVCache, token_ids: TokenIds, num_logits: int = 1, *, hidden: bool = False
    ) -> Step:
        """Appends tokens (int64 [n], n ≥ 1) to `cache`; gives the last `num_logits` positions' logits.

        Prefill and decode are the same call; long input is fed in chunks. Raises ContextOverflowError when
        the cache would overflow, BackendError when the library fails (the cache's length is then unchanged)
        or when `hidden` is asked of a graph without hidden states.
        """

    def close(self) -> None:
        """Releases graph and weights. Idempotent; its caches cannot be extended any more."""


class DecoderSession(Protocol):
    """One causal LM with one preallocated KV cache for one sequence. Not thread-safe."""

    @property
    def context_tokens(self) -> int:
        """Capacity of the KV cache in tokens."""

    @property
    def vocab_size(self) -> int:
        """Width of a logits row."""

    @property
    def length_tokens(self) -> int:
        """Tokens now in the KV cache."""

    def extend(self, token_ids: TokenIds, keep: int = 1) -> Logits:
        """Appends tokens (int64 [n], n ≥ 1) to the cache and returns the last `keep` positions' logits.

        Prefill and decode are the same call; long input is fed in chunks. Returns float32 [keep, vocab]: a
        view that is valid until the next call. Raises ContextOverflowError when the cache would overflow,
        BackendError when the library fails (the cache's length is then unchanged).
        """

    def rewind(self, length_tokens: int) -> None:
        """Forgets everything after the first `length_tokens` tokens (0 = start afresh). O(1)."""

    def close(self) -> None:
        """Releases the session. Further calls are an error."""


class EncoderSession(Protocol):
    """One sentence encoder. Thread-safe."""

    @property
    def dimension(self) -> int:
        """Width of an embedding."""

    @property
    def context_tokens(self) -> int:
        """Longest input in tokens."""

    def embed(self, token_ids: list[list[int]]) -> NDArray[np.float32]:
        """Embeds a batch of token id lists (padded inside): float32 [batch, dimension], L2-normalized."""

    def close(self) -> None:
        """Releases the session."""
