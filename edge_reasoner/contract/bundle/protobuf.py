"""Protobuf's wire format, just enough to walk a message: strict, bounded, without copying.

    message = field*
    field   = varint (number << 3 | wire type), then its value
    wire type 0: a varint · 1: 8 bytes · 2: a varint length and that many bytes · 5: 4 bytes

Readers differ on varints that are longer than need be, on keys beyond 32 bits and on numbers beyond 64: such
bytes could mean one thing here and another to the runtime, so they are refused, as are field number 0
and the deprecated groups (wire types 3 and 4). A key has 32 bits, so field numbers end at 2^29 - 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10

Data = TypeVar("Data", bytes, memoryview)


class ProtobufError(ValueError):
    """The bytes are not what the wire format allows. Callers turn it into an error of their own format."""


def fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field of the message in `data` (uint8).

    Varints come as int (unsigned, 64 bits), everything else as its bytes. Raises ProtobufError.
    """
    for key, value in keyed_fields(data):
        yield key >> 3, value


def keyed_fields(data: Data) -> Iterator[tuple[int, int | Data]]:
    """As `fields`, with each field's whole key, number << 3 | wire type: for readers that know both."""
    position, end = 0, len(data)
    while position < end:
        key = data[position]
        if key < 0x80:
            position += 1
        else:
            key, position = read_varint(data, position)
        wire_type = key & 7
        if key < 8 or key >> 32:
            raise ProtobufError(f"field number {key >> 3}")
        if wire_type == _BYTES:
            if position < end and data[position] < 0x80:
                size = data[position]
                position += 1
            else:
                size, position = read_varint(data, position)
        elif wire_type == _VARINT:
            value, position = read_varint(data, position)
            yield key, value
            continue
        elif wire_type in (_FIXED32, _FIXED64):
            size = 4 if wire_type == _FIXED32 else 8
        else:
            raise ProtobufError(f"wire type {wire_type}")
        if size > end - position:
            raise ProtobufError("truncated")
        yield key, data[position : position + size]
        position += size


def read_varint(data: bytes | memoryview, position: int) -> tuple[int, int]:
    """The unsigned number at `position`, and the position after it. Raises ProtobufError."""
    value = 0
    for index in range(_MAX_VARINT_BYTES):
        if position >= len(data):
            raise ProtobufError("truncated")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            if value >> 64 or (index and not byte):
                raise ProtobufError("a number that is too large, or longer than need be")
            return value, position
    raise ProtobufError("a number of more than ten bytes")
