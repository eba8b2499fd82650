"""The walker of protobuf messages: what a real writer wrote is read, anything else is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_reasoner.contract.bundle.protobuf import ProtobufError, fields, read_varint


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


@given(number=st.integers(0, 2**64 - 1), tail=st.binary(max_size=3))
def test_varints_round_trip(number, tail):
    """Every number of 64 bits is read back, and nothing after it."""
    data = varint(number)
    assert read_varint(memoryview(data + tail), 0) == (number, len(data))


def test_a_message_of_a_real_writer():
    """An ONNX tensor, written by the onnx_ir package's protobuf classes, field by field."""
    onnx = pytest.importorskip("onnx")
    tensor = onnx.TensorProto(dims=[3, 300], data_type=1, name="weights", raw_data=b"1234")
    found = [
        (number, value if isinstance(value, int) else bytes(value))
        for number, value in fields(memoryview(tensor.SerializeToString()))
    ]
    assert (2, 1) in found and (8, b"weights") in found and (9, b"1234") in found


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x0a", "truncated"),
        (b"\x0a\x05ab", "truncated"),
        (b"\x0d\x00", "truncated"),
        (b"\x0b", "wire type 3"),
        (b"\x0f", "wire type 7"),
        (b"\x00\x00", "field number 0"),
        (b"\x08\x80\x00", "longer than need be"),
        (b"\x88\x00\x01", "longer than need be"),
        (b"\x08" + b"\xff" * 9 + b"\x7f", "too large"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "more than ten bytes"),
        (varint(1 << 33 | 2) + b"\x00", "field number"),
    ],
)
def test_malformed_messages(data, says):
    """Each malformation is refused by name."""
    with pytest.raises(ProtobufError, match=says):
        list(fields(memoryview(data)))
