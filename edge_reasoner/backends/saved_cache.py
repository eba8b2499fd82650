"""Bytes of a KV cache: what `KVCache.save` writes and `DecoderModel.restore` reads.

    magic (8 bytes) · header length (uint32) · header (JSON) · payload · BLAKE2b-128 of all before it

The payload is every buffer's filled part, [heads, length, width] in C order, little-endian, one after the
other. The bytes are untrusted when read: the header must state exactly what the model has, the size must be
exactly what the header states, and nothing is allocated before both are checked. The digest finds damage,
not malice: a forged cache can make a model say nonsense, but nothing worse.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from edge_reasoner.errors import InputError

_MAGIC = b"EDGEKV1\n"
_LENGTH = struct.Struct("<I")
_DIGEST_BYTES = 16
_MAX_HEADER_BYTES = 1 << 16
_WHERE = "saved KV cache"

_Size = Annotated[int, Meta(ge=1, le=1 << 32)]


@dataclass(frozen=True)
class CacheLayout:
    """What a model's caches are made of: its fingerprint, a numpy dtype name, (heads, width) per buffer."""

    model: str
    dtype: str
    buffers: tuple[tuple[int, int], ...]


class _Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    model: Annotated[str, Meta(max_length=200)]
    dtype: Annotated[str, Meta(max_length=20)]
    buffers: tuple[tuple[_Size, _Size], ...]
    context_tokens: _Size
    length_tokens: Annotated[int, Meta(ge=0, le=1 << 32)]


def pack(layout: CacheLayout, context_tokens: int, filled: Sequence[NDArray[Any]]) -> bytes:
    """The bytes of a cache whose buffers hold `filled`, each [heads, length, width]."""
    header = msgspec.json.encode(
        _Header(
            model=layout.model,
            dtype=layout.dtype,
            buffers=layout.buffers,
            context_tokens=context_tokens,
            length_tokens=filled[0].shape[1],
        )
    )
    payload = [np.ascontiguousarray(array, _dtype(layout)).tobytes() for array in filled]
    parts = [_MAGIC, _LENGTH.pack(len(header)), header, *payload]
    return b"".join([*parts, _digest(parts)])


def unpack(saved: bytes, layout: CacheLayout, max_context_tokens: int) -> tuple[int, list[NDArray[Any]]]:
    """(context, read-only views [heads, length, width] of `saved`). Raises InputError unless all fits."""
    header, start = _header(saved)
    theirs = CacheLayout(header.model, header.dtype, header.buffers)
    for name in ("dtype", "buffers", "model"):
        if getattr(theirs, name) != getattr(layout, name):
            raise InputError(f"{_WHERE}: it is of another model ({name} differ)")
    context, length = header.context_tokens, header.length_tokens
    if not length <= context <= max_context_tokens:
        raise InputError(
            f"{_WHERE}: {length} tokens in a context of {context};"
            f" this model's context is {max_context_tokens}"
        )
    dtype = _dtype(layout)
    wanted_bytes = sum(heads * width for heads, width in layout.buffers) * length * dtype.itemsize
    needed_bytes = start + wanted_bytes + _DIGEST_BYTES
    if len(saved) != needed_bytes:
        raise InputError(f"{_WHERE}: {len(saved)} bytes; {needed_bytes} are needed for {length} tokens")
    body = memoryview(saved)[:-_DIGEST_BYTES]
    if _digest([body]) != saved[-_DIGEST_BYTES:]:
        raise InputError(f"{_WHERE}: damaged (its digest does not match)")
    views = []
    for heads, width in layout.buffers:
        count = heads * length * width
        views.append(np.frombuffer(body, dtype, count, start).reshape(heads, length, width))
        start += count * dtype.itemsize
    return context, views


def _header(saved: bytes) -> tuple[_Header, int]:
    """The header and where the payload starts."""
    fixed = len(_MAGIC) + _LENGTH.size
    if len(saved) < fixed or not saved.startswith(_MAGIC):
        raise InputError(f"{_WHERE}: not a saved KV cache of this version")
    size = _LENGTH.unpack_from(saved, len(_MAGIC))[0]
    if size > _MAX_HEADER_BYTES or fixed + size > len(saved):
        raise InputError(f"{_WHERE}: its header is cut off or longer than {_MAX_HEADER_BYTES} bytes")
    try:
        header = msgspec.json.decode(saved[fixed : fixed + size], type=_Header)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{_WHERE}: header: {error}") from error
    return header, fixed + size


def _dtype(layout: CacheLayout) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(layout.dtype).newbyteorder("<")
    return dtype


def _digest(parts: Sequence[bytes | memoryview]) -> bytes:
    digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()
