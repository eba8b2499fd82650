"""One sequence's KV cache: buffers that a graph appends to in place, and the bindings over them.

Each buffer is bound as both `past_key_values` and `present` (GroupQueryAttention then appends in place), so
rewinding is a change of one counter. Buffers are anonymous mappings, whose pages exist only once written: a
large context costs memory only as it fills, and a closed cache gives all of it back.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_reasoner.backends.onnxruntime.session import ort_value
from edge_reasoner.errors import BackendError

#: From this size on, as numpy does it, the kernel is asked for huge pages.
_HUGE_BYTES = 1 << 22
#: Bytes of a cache with so many tokens of context and these filled parts.
Pack = Callable[[int, Sequence[NDArray[Any]]], bytes]


@dataclass(frozen=True)
class Room:
    """Where buffers lie and how long they are."""

    #: (heads, width) of each buffer
    shapes: tuple[tuple[int, int], ...]
    dtype: str
    tokens: int
    device: str


class KVBuffers:
    """Key and value of each layer, [1, heads, room, width]; `values` are what is bound."""

    def __init__(self, room: Room, filled: Sequence[NDArray[Any]] | None = None) -> None:
        """Zeros, with `filled` ([heads, length, width] each) at their start."""
        self._room = room
        self._arrays: list[NDArray[Any]] = []
        self.values: list[Any] = []
        for index, (heads, width) in enumerate(room.shapes):
            array: NDArray[Any] = _zeros((1, heads, room.tokens, width), room.dtype)
            if filled is not None:
                array[0, :, : filled[index].shape[1]] = filled[index]
            self.values.append(ort_value(array, room.device))
            if room.device == "cpu":
                self._arrays.append(array)

    def filled(self, length_tokens: int) -> Iterator[NDArray[Any]]:
        """The first tokens of each buffer, [heads, length, width]: views, or copies from a device."""
        arrays = self._arrays or (value.numpy() for value in self.values)
        for array in arrays:
            yield array[0, :, :length_tokens]

    def copy(self, length_tokens: int) -> KVBuffers:
        """New buffers with the same first tokens."""
        return KVBuffers(self._room, list(self.filled(length_tokens)))


def _zeros(shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """As np.zeros, but never from recycled heap memory, which would have to be written at once."""
    size_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        pages = mmap.mmap(-1, size_bytes)
    except OSError as error:
        raise BackendError(f"no memory for {size_bytes} bytes of KV cache: {error.strerror}") from error
    if size_bytes >= _HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype).reshape(shape)


@dataclass(frozen=True)
class Bindings:
    """Everything that a call reads and writes, bound once: for one token, and for many."""

    decode: Any
    prefill: Any


@dataclass(frozen=True)
class CacheState:
    """What an open cache holds."""

    buffers: KVBuffers
    bindings: Bindings


class OrtKVCache:
    """See `KVCache`. Made by `OrtDecoder` only."""

    def __init__(
        self,
        state: CacheState,
        *,
        where: str,
        context_tokens: int,
        length_tokens: int,
        adopt: Callable[[KVBuffers, int, int], OrtKVCache],
        pack: Pack,
    ) -> None:
        """`adopt` makes a cache of the same model from buffers, context and length."""
        self._state: CacheState | None = state
        self._where = where
        self._context_tokens = context_tokens
        self._length_tokens = length_tokens
        self._adopt, self._pack = adopt, pack

    @property
    def context_tokens(self) -> int:
        """Capacity in tokens."""
        return self._context_tokens

    @property
    def length_tokens(self) -> int:
        """Tokens now in the cache."""
        return self._length_tokens

    @property
    def state(self) -> CacheState:
        """Buffers and bindings. Raises BackendError when the cache, or its model, was closed."""
        if self._state is None:
            raise BackendError(f"{self._where}: the KV cache is closed")
        return self._state

    def grow(self, tokens: int) -> None:
        """Counts tokens that the model has appended."""
        self._length_tokens += tokens

    def rewind(self, length_tokens: int) -> None:
        """See `KVCache.rewind`."""
        _ = self.state
        if not 0 <= length_tokens <= self._length_tokens:
            raise ValueError(f"cannot rewind {self._length_tokens} tokens to {length_tokens}")
        self._length_tokens = length_tokens

    def fork(self) -> OrtKVCache:
        """See `KVCache.fork`."""
        copied = self.state.buffers.copy(self._length_tokens)
        return self._adopt(copied, self._context_tokens, self._length_tokens)

    def save(self) -> bytes:
        """See `KVCache.save`."""
        filled = list(self.state.buffers.filled(self._length_tokens))
        return self._pack(self._context_tokens, filled)

    def close(self) -> None:
        """See `KVCache.close`."""
        self._state = None
