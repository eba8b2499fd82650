"""What a backend offers: decoders (weights, shared) with KV caches (one sequence each), and encoders.

A new backend is one file or package that implements these protocols plus one row in `backends/__init__.py`;
the shared conformance test in `tests/edge_reasoner/backends/` runs against every row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray

from edge_reasoner.contract.bundle.held import HeldGraph
from edge_reasoner.contract.bundle.manifest import DecoderSpec, EncoderSpec
from edge_reasoner.errors import InputError

_MAX_THREADS = 1024
#: a bundle's graph, checked and held; or a file that this program has written itself
Graph = HeldGraph | Path
Logits = NDArray[np.float32]
TokenIds = NDArray[np.int64]


def check_threads(threads: int) -> None:
    """Libraries start every thread asked for, whatever the machine has. Raises InputError: not 1 to 1024."""
    if not 1 <= threads <= _MAX_THREADS:
        raise InputError(f"threads is {threads}; at least 1 is needed, and {_MAX_THREADS} are the most")


@dataclass(frozen=True)
class Step:
    """What one `extend` gave. Views that are valid until the model's next call.

    `logits`: float32 [num_logits, vocab], the last positions'. With `hidden=True` also `hidden_last`, float32
    [hidden]: the final norm's output at the last position, and `hidden_sum`, float32 [hidden]: the same
    summed over the tokens of this call (the caller divides by their number: mean pooling over any span
    costs no second pass).
    """

    logits: Logits
    hidden_last: NDArray[np.float32] | None = None
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
        """Releases the memory. Idempotent; further use is a BackendError."""


class DecoderModel(Protocol):
    """One causal LM: its graph and weights, shared by any number of caches.

    Opening caches is thread-safe; calls of `extend` take turns (the engine has one thread for them). It
    belongs to the process that opened it: a backend with threads of its own refuses work in a forked child
    (BackendError), does nothing on `close` there, and lets the child end.
    """

    @property
    def context_tokens(self) -> int:
        """Longest context of a cache, in tokens."""

    @property
    def vocab_size(self) -> int:
        """Width of a logits row."""

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states."""

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
        the cache would overflow, BackendError when the library fails (the cache's length is then unchanged).
        """

    def close(self) -> None:
        """Releases graph, weights and its caches' memory. Idempotent; further use is a BackendError."""


class EncoderModel(Protocol):
    """One sentence encoder. Thread-safe; in a forked child as `DecoderModel`."""

    @property
    def dimension(self) -> int:
        """Width of an embedding."""

    @property
    def context_tokens(self) -> int:
        """Longest input in tokens."""

    def embed(self, token_ids: list[list[int]]) -> NDArray[np.float32]:
        """Embeds a batch of token id lists (padded inside): float32 [batch, dimension], L2-normalized."""

    def close(self) -> None:
        """Releases graph and weights."""


class OpenDecoder(Protocol):
    """Opens a decoder's graph: the bytes that a `HeldGraph` holds, with the weights that were checked.

    `provider` must take every node: a silent fall-back to another is an error. Raises InputError,
    BundleError when the graph is not what its spec says, BackendError when the library fails.
    """

    def __call__(
        self,
        graph: Graph,
        spec: DecoderSpec,
        *,
        provider: str,
        session_options: Mapping[str, str],
        threads: int,
    ) -> DecoderModel: ...


class OpenOptions(TypedDict):
    """How `OpenDecoder` and `OpenEncoder` open a graph: their keyword arguments."""

    provider: str
    session_options: Mapping[str, str]
    threads: int


class OpenEncoder(Protocol):
    """Opens an encoder's graph; the parameters and errors are those of `OpenDecoder`."""

    def __call__(
        self,
        graph: Graph,
        spec: EncoderSpec,
        *,
        provider: str,
        session_options: Mapping[str, str],
        threads: int,
    ) -> EncoderModel: ...


@dataclass(frozen=True)
class Backend:
    """One inference library, loaded."""

    name: str
    runtime_version: str
    providers: tuple[str, ...]
    open_decoder: OpenDecoder
    open_encoder: OpenEncoder
