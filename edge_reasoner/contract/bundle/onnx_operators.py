"""The standard operators that exported graphs are made of, each wired as the exporter wires it.

A rule takes a call whose attributes were checked, refuses (RuleError) inputs that the exporter would not give
it, and says what comes out. Element types that a kernel does not have are the runtime's to refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from edge_reasoner.contract.bundle.onnx_scan import BOOL, FLOAT, FLOAT16, INT32, INT64, Dim
from edge_reasoner.contract.bundle.onnx_values import (
    FLOATS,
    Between,
    Call,
    Operator,
    Value,
    broadcast,
    fits,
    require,
    width,
)

_LAST = 2**63 - 1
#: graph inputs that say how many last positions are kept
_KEEPERS = ("logits_to_keep", "states_to_keep")
_LOOKED_UP = ("input_ids", "token_type_ids")
EPSILON = Between(0.0, 1.0)


def _gather(call: Call) -> tuple[Value, ...]:
    """A row for each id, one position of each sequence, or one size of a shape."""
    data, indices, axis = call.input(0), call.input(1), call.integer("axis")
    if indices.source in _LOOKED_UP:
        require(data.stored and len(data.shape) == 2 and axis == 0, "ids must look up rows of a table")
        require(data.type in FLOATS, "a table must hold floats")
        return (Value(data.type, (*indices.shape, width(data))),)
    (index,) = call.constant(1, rank=0)
    if data.content is not None and not data.stored:
        require(
            len(data.shape) == 1 and axis == 0 and 0 <= index < len(data.content), f"there is no size {index}"
        )
        return (Value(INT64, (), content=(data.content[index],)),)
    states = call.floats(0, rank=3)
    require(axis == 1 and index in (0, -1), "only the first or the last position may be taken")
    return (Value(states.type, (states.shape[0], states.shape[2])),)


def _slice(call: Call) -> tuple[Value, ...]:
    """The last positions, as many as a graph input says; the first columns; the first rows of a table."""
    data, start, stop, axes = call.input(0), call.input(1), call.input(2), call.constant(3)
    require(data.type in FLOATS, "only floats are cut")
    require(start.shape == stop.shape == (1,), "it must be cut once")
    if axes == (1,) and stop.content == (_LAST,) and start.content is not None:
        keeper = start.content[0]
        require(isinstance(keeper, str) and keeper[:1] == "-" and len(data.shape) == 3, "not the last rows")
        return (Value(data.type, (data.shape[0], str(keeper)[1:], data.shape[2])),)
    require(start.content == (0,), "it must start at 0")
    bound: Dim = stop.content[0] if stop.content else 0
    if axes == (0,):
        require(data.stored and len(data.shape) == 2 and bound == "tokens", "not the first positions")
        return (Value(data.type, (bound, width(data))),)
    # of what is stored the runtime would keep a copy for each cut
    require(axes == (-1,) and not data.stored, "not the first columns of rows that were looked up")
    require(isinstance(bound, int) and 0 < bound <= width(data), "not the first columns")
    return (Value(data.type, (*data.shape[:-1], bound)),)


def _elementwise(call: Call) -> tuple[Value, ...]:
    """Floats where one operand has the result's shape, or reckoning with positions."""
    first, second = call.input(0), call.input(1)
    require(first.type == second.type, "the operands have two types")
    if first.type == INT64:
        require(not (first.stored and second.stored), "both operands are constants")
        return (Value(INT64, broadcast(first.shape, second.shape)),)
    require(first.type in FLOATS and not (first.stored and second.stored), "the operands must be floats")
    large, small = (first, second) if fits(second.shape, first.shape) else (second, first)
    require(fits(small.shape, large.shape) and not large.stored, "the operands do not go together")
    return (Value(first.type, large.shape),)


def _unary(call: Call) -> tuple[Value, ...]:
    value = call.floats(0)
    return (Value(value.type, value.shape),)


def _norm(call: Call) -> tuple[Value, ...]:
    value = call.floats(0)
    call.weight(1, (width(value),), {value.type})
    return (Value(value.type, value.shape),)


def _split(call: Call) -> tuple[Value, ...]:
    value, sizes = call.floats(0, rank=3), call.constant(1)
    require(len(sizes) == len(call.node.outputs) and min(sizes) > 0, "sizes must be positive, one an output")
    require(sum(sizes) == width(value), f"sizes {sizes} are not a width of {width(value)}")
    return tuple(Value(value.type, (*value.shape[:-1], size)) for size in sizes)


def _reshape(call: Call) -> tuple[Value, ...]:
    """[batch, tokens, heads·width] to heads of their own, or back."""
    value, shape = call.floats(0), call.constant(1)
    require(len(value.shape) >= 3 and len(shape) in (3, 4) and shape[:2] == (0, 0), "not heads")
    kept, numbers = value.shape[2:], shape[2:]
    require(min(numbers) > 0, "sizes must be positive")
    require(_product(kept) == _product(numbers), "another number of elements")
    return (Value(value.type, (*value.shape[:2], *numbers)),)


def _product(shape: tuple[Dim, ...]) -> int:
    result = 1
    for dim in shape:
        require(isinstance(dim, int), "a size that is not known")
        result *= int(dim)
    return result


def _cast(call: Call) -> tuple[Value, ...]:
    value, to = call.input(0), call.integer("to")
    if value.type in FLOATS:
        require(to in FLOATS and to != value.type, "floats become other floats only")
        return (Value(to, value.shape, stored=value.stored),)
    require(bool(value.source), "only floats and graph inputs are converted")
    content: tuple[Dim, ...] | None = None
    if value.source == "attention_mask":
        require(to in (INT32, FLOAT), "a mask becomes int32 or float32")
        # what MultiHeadAttention is given is this, and nothing else
        return (Value(to, value.shape, source="key_mask" if to == INT32 else ""),)
    if value.source == "token_type_ids":
        require(to == FLOAT, "token types become float32")
        return (Value(to, value.shape),)
    require(value.type == INT32 and to == INT64, "lengths become int64")
    if value.source == "total_sequence_length":
        content = ("total",)
    return (Value(INT64, value.shape, content=content),)


def _shape(call: Call) -> tuple[Value, ...]:
    value = call.input(0)
    require(value.source == "input_ids", "only the shape of the ids is asked for")
    content = value.shape[call.integer("start") : call.integer("end", len(value.shape))]
    require(bool(content), "an empty shape")
    return (Value(INT64, (len(content),), content=content),)


def _unsqueeze(call: Call) -> tuple[Value, ...]:
    value, axes = call.input(0), call.constant(1)
    require(not value.stored, "input 0 must be computed")
    rank = len(value.shape) + len(axes)
    require(rank <= 4 and len(set(axes)) == len(axes) and set(axes) <= set(range(rank)), f"axes {axes}")
    dims = iter(value.shape)
    return (Value(value.type, tuple(1 if axis in axes else next(dims) for axis in range(rank))),)


def _squeeze(call: Call) -> tuple[Value, ...]:
    value, axes = call.floats(0, rank=3), call.constant(1)
    require(axes == (1,) and value.shape[1] == 1, f"axes {axes}")
    return (Value(value.type, (value.shape[0], value.shape[2])),)


def _range(call: Call) -> tuple[Value, ...]:
    """0, 1, … for the tokens of this call, or for all."""
    limit = call.input(1)
    require(
        call.constant(0, rank=0) == (0,) and call.constant(2, rank=0) == (1,), "it must count from 0 by 1"
    )
    require(
        limit.shape == () and limit.content in (("tokens",), ("total",)), "its end must be a number of tokens"
    )
    return (Value(INT64, limit.content or ()),)


def _compare(call: Call) -> tuple[Value, ...]:
    first, second = call.input(0), call.input(1)
    require(first.type == second.type == INT64, "only positions are compared")
    require(not (first.stored or second.stored), "a constant is compared")
    return (Value(BOOL, broadcast(first.shape, second.shape)),)


def _where(call: Call) -> tuple[Value, ...]:
    condition = call.input(0)
    require(condition.type == BOOL, "input 0 must be a condition")
    chosen = [call.weight(index, (), FLOATS, plain=True) for index in (1, 2)]
    require(chosen[0].type == chosen[1].type, "the operands have two types")
    return (Value(chosen[0].type, condition.shape),)


def _negative(call: Call) -> tuple[Value, ...]:
    value = call.input(0)
    require(value.source in _KEEPERS, f"input 0 must be {' or '.join(_KEEPERS)}")
    return (Value(INT64, value.shape, content=(f"-{value.source}",)),)


def _sum(call: Call) -> tuple[Value, ...]:
    value = call.floats(0, rank=3)
    require(call.constant(1) == (1,), "only positions are summed")
    return (Value(value.type, (value.shape[0], value.shape[2])),)


def _matmul(call: Call) -> tuple[Value, ...]:
    """[batch, 1, tokens] × [batch, tokens, width]: a weighted sum over the tokens."""
    row, states = call.floats(0, rank=3), call.floats(1, rank=3)
    require(row.type == states.type, "the operands have two types")
    require(row.shape == (states.shape[0], 1, states.shape[1]), "not a weight for each token")
    return (Value(row.type, (states.shape[0], 1, states.shape[2])),)


#: op_type -> the operator of the standard domain. The exporter writes all but Identity and Sigmoid, with
#: which SiLU can be written in standard operators alone.
STANDARD: Final[Mapping[str, Operator]] = {
    "Add": Operator(_elementwise, range(2, 3)),
    "Cast": Operator(_cast, range(1, 2), required={"to": {FLOAT, FLOAT16, INT32, INT64}}),
    "Div": Operator(_elementwise, range(2, 3)),
    "Gather": Operator(_gather, range(2, 3), optional={"axis": range(2)}),
    "Gelu": Operator(_unary, range(1, 2), required={"approximate": {"tanh"}}),
    "Identity": Operator(_unary, range(1, 2)),
    "LessOrEqual": Operator(_compare, range(2, 3)),
    "LpNormalization": Operator(_unary, range(1, 2), required={"axis": {-1}, "p": {2}}),
    "MatMul": Operator(_matmul, range(2, 3)),
    "Mul": Operator(_elementwise, range(2, 3)),
    "Neg": Operator(_negative, range(1, 2)),
    "Range": Operator(_range, range(3, 4)),
    "ReduceSum": Operator(_sum, range(2, 3), required={"keepdims": {0}}),
    "Reshape": Operator(_reshape, range(2, 3)),
    "Shape": Operator(_shape, range(1, 2), optional={"start": range(2), "end": range(1, 3)}),
    "Sigmoid": Operator(_unary, range(1, 2)),
    "SimplifiedLayerNormalization": Operator(
        _norm, range(2, 3), required={"axis": {-1}, "epsilon": EPSILON}, optional={"stash_type": {1}}
    ),
    "Slice": Operator(_slice, range(4, 5)),
    "Split": Operator(_split, range(2, 3), range(2, 4), required={"axis": {-1}}),
    "Squeeze": Operator(_squeeze, range(2, 3)),
    "Sub": Operator(_elementwise, range(2, 3)),
    "Tanh": Operator(_unary, range(1, 2)),
    "Unsqueeze": Operator(_unsqueeze, range(2, 3)),
    "Where": Operator(_where, range(3, 4)),
}
