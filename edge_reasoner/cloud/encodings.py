"""Compressed replies, unpacked within bounds."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from edge_reasoner.errors import CloudProtocolError, CloudUnavailableError

_PIECE_BYTES = 64 * 1024
_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32
_NAMES = frozenset(("gzip", "x-gzip", "deflate"))
#: said of bytes that are not packed
_UNPACKED = frozenset(
    ("identity", "none", "null", "utf-8", "utf8", "binary", "7bit", "8bit", "chunked", "aws-chunked")
)


def unpacked(chunks: Iterable[bytes], encoding: str, limit_bytes: int) -> Iterator[bytes]:
    """`chunks` as they were before `encoding` (a `Content-Encoding`): identity, gzip or deflate.

    Raises CloudProtocolError for other encodings and beyond `limit_bytes`, packed or unpacked, before more
    than a piece of the excess is made; CloudUnavailableError for data that is broken or cut off.
    """
    names = [name.strip().lower() for name in encoding.split(",") if name.strip()]
    names = [name for name in names if name not in _UNPACKED]
    if not names:
        yield from _bounded(chunks, limit_bytes)
    elif len(names) == 1 and names[0] in _NAMES:
        yield from _bounded(_inflated(_bounded(chunks, limit_bytes)), limit_bytes)
    else:
        raise CloudProtocolError(f"a reply in the encoding {encoding[:40]!r}, which was not asked for")


def _bounded(chunks: Iterable[bytes], limit_bytes: int) -> Iterator[bytes]:
    total_bytes = 0
    for chunk in chunks:
        total_bytes += len(chunk)
        if total_bytes > limit_bytes:
            raise CloudProtocolError(f"a reply of more than {limit_bytes} bytes")
        yield chunk


def _inflated(chunks: Iterable[bytes]) -> Iterator[bytes]:
    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)
    seen = False
    try:
        for chunk in chunks:
            while chunk:
                try:
                    piece = unpacker.decompress(chunk, _PIECE_BYTES)
                except zlib.error:
                    if seen:
                        raise
                    # "deflate" without the header that the standard asks for
                    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
                    piece = unpacker.decompress(chunk, _PIECE_BYTES)
                seen = True
                if piece:
                    yield piece
                chunk = unpacker.unconsumed_tail
                if unpacker.eof:
                    chunk = unpacker.unused_data
                    unpacker = zlib.decompressobj(_GZIP_OR_ZLIB)
                    seen = False
    except zlib.error as error:
        raise CloudUnavailableError("a compressed reply that is broken") from error
    if seen and not unpacker.eof:
        raise CloudUnavailableError("a compressed reply that is cut off")
