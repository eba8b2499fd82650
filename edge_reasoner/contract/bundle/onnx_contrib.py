"""onnxruntime's own operators that exported graphs are made of, each wired as the exporter wires it.

Old runtimes trust the inputs of these: one that is of another shape, or a constant where a length is
expected, makes them read and write beyond their buffers. So every shape is checked here, and lengths and
caches must be the graph's own inputs. Rules as in `onnx_operators`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from edge_reasoner.contract.bundle.onnx_operators import EPSILON
from edge_reasoner.contract.bundle.onnx_scan import FLOAT, UINT8
from edge_reasoner.contract.bundle.onnx_values import (
    CACHE,
    FLOATS,
    Between,
    Call,
    Operator,
    Value,
    require,
    width,
)

_BITS = frozenset({4, 8})
_BLOCKS = frozenset({16, 32, 64, 128, 256})
_HEADS = range(1, 4097)
_SIZES = range(1, 1 << 31)


def _matmul_nbits(call: Call) -> tuple[Value, ...]:
    """[…, K] × a block-quantized [N, K]ᵀ."""
    value = call.floats(0)
    rows, columns = call.integer("N"), call.integer("K")
    bits, block = call.integer("bits"), call.integer("block_size")
    require(value.type == FLOAT, "input 0 must be float32")
    require(value.shape[-1:] == (columns,), "K is not the input's width")
    blocks = -(-columns // block)
    call.weight(1, (rows, blocks, block * bits // 8), {UINT8}, plain=True)
    # as a table or as one row: the kernel reads the same bytes
    flat = call.input(2).shape == (rows * blocks,)
    call.weight(2, (rows * blocks,) if flat else (rows, blocks), {FLOAT}, plain=True)
    if call.optional(3) is not None:
        call.weight(3, (rows, -(-blocks * bits // 8)), {UINT8}, plain=True)
    return (Value(value.type, (*value.shape[:-1], rows)),)


def _gather_block_quantized(call: Call) -> tuple[Value, ...]:
    """A row of a block-quantized table for each id."""
    table, ids, bits, block = call.input(0), call.input(1), call.integer("bits"), call.integer("block_size")
    require(ids.source == "input_ids", "input 1 must be input_ids")
    require(table.initializer and table.type == UINT8 and len(table.shape) == 2, "input 0 must be a table")
    rows, block_bytes = table.shape[0], block * bits // 8
    blocks = width(table) // block_bytes
    require(blocks > 0 and width(table) == blocks * block_bytes, "its rows are not whole blocks")
    call.weight(2, (rows, blocks), {FLOAT}, plain=True)
    if call.optional(3) is not None:
        call.weight(3, (rows, -(-blocks * bits // 8)), {UINT8}, plain=True)
    return (Value(FLOAT, (*ids.shape, blocks * block)),)


def _fused_matmul(call: Call) -> tuple[Value, ...]:
    """[…, K] × a stored [N, K]ᵀ."""
    value, weight = call.floats(0, rank=3), call.input(1)
    require(len(weight.shape) == 2, "input 1 must be a matrix")
    call.weight(1, (weight.shape[0], width(value)), {value.type})
    return (Value(value.type, (*value.shape[:-1], weight.shape[0])),)


def _skip_rms_norm(call: Call) -> tuple[Value, ...]:
    value, skip = call.floats(0, rank=3), call.floats(1, rank=3)
    require((value.type, value.shape) == (skip.type, skip.shape), "the inputs differ in type or shape")
    call.weight(2, (width(value),), {value.type})
    require(call.node.outputs[1:3] == ("", ""), "mean and deviation must stay unused")
    return (Value(value.type, value.shape),) * 4


def _skip_norm(call: Call) -> tuple[Value, ...]:
    value, skip = call.floats(0, rank=3), call.floats(1, rank=3)
    require((value.type, value.shape) == (skip.type, skip.shape), "the inputs differ in type or shape")
    for index in (2, 3, 4):
        if index < 4 or call.optional(4) is not None:
            call.weight(index, (width(value),), {value.type})
    return (Value(value.type, value.shape),)


def _group_query_attention(call: Call) -> tuple[Value, ...]:
    """Appends to the cache of one layer and reads it all; rotates inside."""
    query, heads, kv_heads = call.floats(0, rank=3), call.integer("num_heads"), call.integer("kv_num_heads")
    past = [call.input(index) for index in (3, 4)]
    require(
        past[0].source.endswith(".key") and past[1].source == past[0].source[: -len("key")] + "value",
        "inputs 3 and 4 must be one layer's past key and value",
    )
    require(
        past[0].shape == past[1].shape and past[0].type == query.type, "the cache has another type or shape"
    )
    require(past[0].shape[:2] == ("batch", kv_heads), f"the cache is not of {kv_heads} heads")
    require(heads % kv_heads == 0, f"{heads} heads cannot share {kv_heads}")
    size = width(past[0])
    require(size % 2 == 0, "a head's width must be even")
    require(query.shape[:2] == ("batch", "tokens"), "input 0 must have a row for each token")
    packed = call.optional(1) is None
    require(packed == (call.optional(2) is None), "key and value must be both packed or both apart")
    require(width(query) == (heads + 2 * kv_heads * packed) * size, f"the query's width is {width(query)}")
    for index in () if packed else (1, 2):
        other = call.floats(index)
        require(other.type == query.type, f"input {index} has another type")
        require(other.shape == ("batch", "tokens", kv_heads * size), f"input {index} has another shape")
    for index, name in ((5, "seqlens_k"), (6, "total_sequence_length")):
        require(call.input(index).source == name, f"input {index} must be the graph's input {name}")
    _rotary_tables(call, query.type, size)
    if len(call.inputs) > 9:
        _attention_bias(call, query.type)
    out = Value(query.type, ("batch", "tokens", heads * size))
    return out, *(Value(side.type, side.shape, source=CACHE) for side in past)


def _rotary_tables(call: Call, element_type: int, size: int) -> None:
    cos = call.input(7)
    require(len(cos.shape) == 2, "input 7 must be a table")
    for index in (7, 8):
        call.weight(index, (cos.shape[0], size // 2), {element_type})


def _attention_bias(call: Call, element_type: int) -> None:
    bias = call.input(10)
    require(call.optional(9) is None and len(call.inputs) == 11, "positions and sinks are not allowed")
    require(bias.type == element_type, "the bias has another type")
    require(bias.shape == ("batch", 1, "tokens", "total"), "the bias has another shape")


def _multi_head_attention(call: Call) -> tuple[Value, ...]:
    query, heads = call.floats(0, rank=3), call.integer("num_heads")
    size = width(query)
    require(query.shape[:2] == ("batch", "tokens") and size % heads == 0, "the query has another shape")
    for index in (1, 2):
        other = call.floats(index)
        require(
            (other.type, other.shape) == (query.type, query.shape), f"input {index} is not like the query"
        )
    call.weight(3, (3 * size,), {query.type})
    mask = call.input(4)
    require(mask.source == "key_mask", "input 4 must be attention_mask as int32")
    return (Value(query.type, query.shape),)


def _gelu(call: Call) -> tuple[Value, ...]:
    value = call.floats(0)
    if len(call.inputs) > 1:
        call.weight(1, (width(value),), {value.type})
    require(value.type in FLOATS, "input 0 must be floats")
    return (Value(value.type, value.shape),)


#: op_type -> the operator of the domain com.microsoft
MICROSOFT: Final[Mapping[str, Operator]] = {
    "BiasGelu": Operator(_gelu, range(2, 3)),
    "FusedMatMul": Operator(_fused_matmul, range(2, 3), required={"transB": {1}}),
    "GatherBlockQuantized": Operator(
        _gather_block_quantized,
        range(3, 5),
        required={"bits": _BITS, "block_size": _BLOCKS, "gather_axis": {0}, "quantize_axis": {1}},
    ),
    "GroupQueryAttention": Operator(
        _group_query_attention,
        range(9, 12),
        range(3, 4),
        required={"num_heads": _HEADS, "kv_num_heads": _HEADS, "do_rotary": {1}, "rotary_interleaved": {0}},
        optional={"scale": Between(1e-6, 1e3)},
    ),
    "MatMulNBits": Operator(
        _matmul_nbits,
        range(3, 5),
        required={
            "K": _SIZES,
            "N": _SIZES,
            "bits": _BITS,
            "block_size": _BLOCKS,
            "accuracy_level": range(5),
        },
    ),
    "MultiHeadAttention": Operator(
        _multi_head_attention,
        range(5, 6),
        required={"num_heads": _HEADS, "mask_filter_value": Between(-1e6, -1.0)},
    ),
    "QuickGelu": Operator(_gelu, range(1, 2), required={"alpha": Between(0.5, 2.0)}),
    "SkipLayerNormalization": Operator(_skip_norm, range(4, 6), required={"epsilon": EPSILON}),
    "SkipSimplifiedLayerNormalization": Operator(
        _skip_rms_norm, range(3, 4), range(4, 5), required={"epsilon": EPSILON}
    ),
}
