"""The storage layout of quantized matrices: onnxruntime reads the very weights that `dequantize` returns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from edge_export.quantize import QUANTIZERS, make_quantizer
from edge_export.quantize.base import BlockQuantized, pack_blocks, to_blocks
from edge_export.quantize.formats import BlockFormat

FORMATS = [
    BlockFormat(bits, block_size, symmetric)
    for bits in (4, 8)
    for block_size in (16, 32, 64, 128)
    for symmetric in (True, False)
]
#: fits whole blocks; does not; an odd number of blocks of every size
COLUMNS = [128, 80, 200, 384]


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Random weights with a few outliers and an offset, so that zero points differ from the middle."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) + 0.3
    weight[:, ::37] *= 5
    return weight


def run(op: str, feeds: dict[str, np.ndarray], stored: dict[str, np.ndarray | None], **attributes):
    """One node of com.microsoft on onnxruntime's CPU provider; initializers as stored, in input order."""
    names = [*feeds, *((name if value is not None else "") for name, value in stored.items())]
    if op == "GatherBlockQuantized":  # data comes first
        names = [next(iter(stored)), *feeds, *names[len(feeds) + 1 :]]
    node = helper.make_node(op, names, ["out"], domain="com.microsoft", **attributes)
    types = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, types[v.dtype], v.shape) for n, v in feeds.items()],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(v, n) for n, v in stored.items() if v is not None],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


def multiplied(quantized: BlockQuantized, inputs: np.ndarray, level: int) -> np.ndarray:
    """MatMulNBits on the stored data."""
    fmt = quantized.format
    stored = {"q": quantized.packed, "s": quantized.scales, "z": quantized.zero_points}
    return run(
        "MatMulNBits",
        {"x": inputs},
        stored,
        K=quantized.columns,
        N=quantized.rows,
        bits=fmt.bits,
        block_size=fmt.block_size,
        accuracy_level=level,
    )


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_matmulnbits_reads_the_same_weights(fmt, columns):
    """Unit vectors through MatMulNBits give every stored weight; at levels 0 and 1 they are exact."""
    quantized = make_quantizer("rtn").quantize(matrix(24, columns), fmt)
    expected = quantized.dequantize().numpy()
    for level in (0, 1):
        got = multiplied(quantized, np.eye(columns, dtype=np.float32), level).T
        np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_gather_reads_the_same_rows(fmt, columns):
    """GatherBlockQuantized gives the same rows, bit for bit, and zeros where a row was padded."""
    quantized = make_quantizer("rtn").quantize(matrix(24, columns), fmt)
    ids = np.array([[5, 0, 23, 5]], np.int64)
    flat = quantized.packed.reshape(24, -1)
    got = run(
        "GatherBlockQuantized",
        {"ids": ids},
        {"q": flat, "s": quantized.scales, "z": quantized.zero_points},
        bits=fmt.bits,
        block_size=fmt.block_size,
        gather_axis=0,
        quantize_axis=1,
    )
    assert np.array_equal(got[0, :, :columns], quantized.dequantize().numpy()[ids[0]])
    assert not got[0, :, columns:].any()


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_padding_decodes_to_zero(name):
    """Codes behind the last column mean zero: a kernel may multiply them with anything."""
    for fmt in FORMATS:
        quantized = make_quantizer(name).quantize(matrix(6, 72), fmt)
        whole = replace(quantized, columns=quantized.scales.shape[1] * fmt.block_size).dequantize()
        assert whole.shape[1] > 72 or fmt.block_size <= 8
        assert not whole[:, 72:].any() and whole[:, :72].any()


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.integers(1, 5),
    st.integers(1, 300),
    st.integers(0, 2**32 - 1),
)
def test_packing_loses_nothing(fmt, rows, columns, seed):
    """Whatever the codes, scales and zero points: dequantize returns (q − zero) · scale of each."""
    random = np.random.default_rng(seed)
    blocks = -(-columns // fmt.block_size)
    top = 1 << fmt.bits
    codes = random.integers(0, top, (rows, blocks, fmt.block_size))
    scales = random.normal(0, 1, (rows, blocks)).astype(np.float32)
    zeros = None if fmt.symmetric else random.integers(0, top, (rows, blocks))
    packed = pack_blocks(
        torch.from_numpy(codes),
        torch.from_numpy(scales),
        None if zeros is None else torch.from_numpy(zeros),
        fmt,
        columns,
    )
    middle = np.full((rows, blocks), top // 2) if zeros is None else zeros
    expected = ((codes - middle[..., None]).astype(np.float32) * scales[..., None]).reshape(rows, -1)
    assert np.array_equal(packed.dequantize().numpy(), expected[:, :columns])
    stored = packed.packed.nbytes + packed.scales.nbytes + (0 if zeros is None else packed.zero_points.nbytes)
    assert packed.size_bytes == stored
    if fmt.symmetric or blocks % 2 == 0:  # an odd number of 4-bit zero points leaves a nibble unused
        assert packed.size_bytes * 8 == rows * blocks * fmt.block_size * fmt.bits_per_weight


def test_blocks_are_zero_padded():
    """Rows are cut into blocks in order, the last one filled with zeros."""
    blocks = to_blocks(torch.arange(1.0, 41).reshape(2, 20), 16)
    assert blocks.shape == (2, 2, 16)
    assert blocks[1, 0].tolist() == [float(n) for n in range(21, 37)]
    assert blocks[1, 1].tolist() == [37.0, 38.0, 39.0, 40.0] + [0.0] * 12


@pytest.mark.parametrize(
    ("bits", "block_size", "message"),
    [(5, 32, "bits: 5; allowed: 4, 8"), (4, 8, "block_size: 8"), (4, 48, "powers of two")],
)
def test_formats_that_no_kernel_reads(bits, block_size, message):
    """Other widths and block sizes are refused by name."""
    with pytest.raises(ValueError, match=message):
        BlockFormat(bits, block_size, True)
