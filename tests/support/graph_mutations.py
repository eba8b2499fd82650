"""Deterministic mutations of graphs: bytes changed as of any file, and values changed in what onnx reads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import onnx
from hostile.fuzz.mutate import mutations
from onnx import TensorProto

_NUMBERS = (-(2**62), -1, 0, 1, 2, 3, 4, 8, 16, 32, 64, 65, 127, 1 << 20, 1 << 31, (1 << 62) + 1)
_FLOATS = (0.0, -1.0, 1.0, 1e-6, 1e-5, 0.5, 1e38, float("nan"), float("inf"))
_TEXTS = ("tanh", "none", "", "location", "d.data", "../d.data", "seqlens_k", "past_key_values.0.key")
_OPERATORS = (
    "Identity",
    "Tanh",
    "Sigmoid",
    "Mul",
    "Add",
    "Sub",
    "Div",
    "Neg",
    "Cast",
    "Loop",
    "Gather",
    "If",
)


def graph_mutations(seeds: Sequence[bytes], count: int, *, seed: int = 0) -> Iterator[bytes]:
    """`count` damaged graphs, the same ones for the same arguments: a third by bytes, two thirds by values.

    A mutation by values is written by the onnx package, so that nothing but the value speaks against it.
    """
    rng = random.Random(seed)
    by_bytes = mutations(seeds, count, seed=seed)
    for number in range(count):
        damaged = next(by_bytes)
        if number % 3 == 0:
            yield damaged
            continue
        model = onnx.load_from_string(seeds[number % len(seeds)])
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            rng.choice(_EDITS)(rng, model)
        yield model.SerializeToString(deterministic=True)


def _number(rng: random.Random, old: int) -> int:
    return rng.choice((old + 1, max(old - 1, 0), 2 * old, old // 2, rng.choice(_NUMBERS)))


def _attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice([node for node in model.graph.node if node.attribute])
    item = rng.choice(node.attribute)
    if item.type == onnx.AttributeProto.INT:
        item.i = _number(rng, item.i)
    elif item.type == onnx.AttributeProto.FLOAT:
        item.f = rng.choice((*_FLOATS, item.f * 2, item.f / 2))
    else:
        item.s = rng.choice(_TEXTS).encode()


def _new_attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    node, donor = (rng.choice([n for n in model.graph.node if n.attribute]) for _ in range(2))
    node.attribute.add().CopyFrom(rng.choice(donor.attribute))


def _drop_attribute(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice([node for node in model.graph.node if node.attribute])
    del node.attribute[rng.randrange(len(node.attribute))]


def _input(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice([node for node in model.graph.node if node.input])
    names = [name for other in model.graph.node for name in (*other.input, *other.output)]
    node.input[rng.randrange(len(node.input))] = rng.choice((*names, "", "nowhere"))


def _swap_inputs(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice([node for node in model.graph.node if len(node.input) > 1])
    first, second = (rng.randrange(len(node.input)) for _ in range(2))
    node.input[first], node.input[second] = node.input[second], node.input[first]


def _more_inputs(rng: random.Random, model: onnx.ModelProto) -> None:
    rng.choice(model.graph.node).input.append(rng.choice(model.graph.input).name)


def _shape(rng: random.Random, model: onnx.ModelProto) -> None:
    item = rng.choice(model.graph.initializer)
    if item.dims:
        place = rng.randrange(len(item.dims))
        item.dims[place] = _number(rng, item.dims[place])
    for value in model.graph.value_info:
        if value.name == item.name and rng.random() < 0.8:
            for dim, size in zip(value.type.tensor_type.shape.dim, item.dims, strict=True):
                dim.dim_value = size


def _fitting_shape(rng: random.Random, model: onnx.ModelProto) -> None:
    """Another shape of as many bytes."""
    item = rng.choice([item for item in model.graph.initializer if len(item.dims) > 1])
    item.dims[:] = list(reversed(item.dims))
    for value in model.graph.value_info:
        if value.name == item.name:
            for dim, size in zip(value.type.tensor_type.shape.dim, item.dims, strict=True):
                dim.dim_value = size


def _content(rng: random.Random, model: onnx.ModelProto) -> None:
    inside = [
        item for item in model.graph.initializer if item.raw_data and item.data_type == TensorProto.INT64
    ]
    if inside:
        item = rng.choice(inside)
        count = len(item.raw_data) // 8
        item.raw_data = b"".join(
            rng.choice(_NUMBERS).to_bytes(8, "little", signed=True) for _ in range(count)
        )


def _type(rng: random.Random, model: onnx.ModelProto) -> None:
    rng.choice(model.graph.initializer).data_type = rng.choice((1, 2, 3, 6, 7, 8, 9, 10, 16))


def _region(rng: random.Random, model: onnx.ModelProto) -> None:
    item = rng.choice([item for item in model.graph.initializer if item.external_data])
    entry = rng.choice(item.external_data)
    if entry.key == "location":
        entry.value = rng.choice(_TEXTS)
    else:
        entry.value = str(_number(rng, int(entry.value)))


def _swap_regions(rng: random.Random, model: onnx.ModelProto) -> None:
    outside = [item for item in model.graph.initializer if item.external_data]
    first, second = rng.choice(outside), rng.choice(outside)
    kept = [(entry.key, entry.value) for entry in first.external_data]
    for entry, other in zip(first.external_data, second.external_data, strict=True):
        entry.value = other.value
    for entry, (_, value) in zip(second.external_data, kept, strict=True):
        entry.value = value


def _declared(rng: random.Random, model: onnx.ModelProto) -> None:
    value = rng.choice((*model.graph.input, *model.graph.output, *model.graph.value_info))
    dims = value.type.tensor_type.shape.dim
    if dims and rng.random() < 0.8:
        dim = rng.choice(dims)
        if rng.random() < 0.5:
            dim.dim_value = abs(_number(rng, dim.dim_value))
        else:
            dim.dim_param = rng.choice(("batch", "tokens", "kept", "context", "x"))
    else:
        value.type.tensor_type.elem_type = rng.choice((1, 6, 7, 10))


def _rename(rng: random.Random, model: onnx.ModelProto) -> None:
    """A value gets another name wherever it is read."""
    node = rng.choice(model.graph.node)
    old, new = node.output[0], f"v{rng.randrange(100)}"
    for other in model.graph.node:
        for names in (other.input, other.output):
            names[:] = [new if name == old else name for name in names]


def _label(rng: random.Random, model: onnx.ModelProto) -> None:
    rng.choice(model.graph.node).name = f"n{rng.randrange(100)}"
    model.producer_version = str(rng.randrange(100))
    model.ir_version = rng.choice((3, 8, 9, 10, 11, 99))


def _operator(rng: random.Random, model: onnx.ModelProto) -> None:
    node = rng.choice(model.graph.node)
    node.op_type = rng.choice((*_OPERATORS, *(other.op_type for other in model.graph.node)))
    node.domain = rng.choice((node.domain, "", "com.microsoft"))


def _drop_node(rng: random.Random, model: onnx.ModelProto) -> None:
    del model.graph.node[rng.randrange(len(model.graph.node))]


def _repeat_node(rng: random.Random, model: onnx.ModelProto) -> None:
    node = model.graph.node.add()
    node.CopyFrom(rng.choice(model.graph.node))
    node.output[:] = [name and f"{name}.again" for name in node.output]


def _move_node(rng: random.Random, model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)
    nodes.insert(rng.randrange(len(nodes)), nodes.pop(rng.randrange(len(nodes))))
    del model.graph.node[:]
    model.graph.node.extend(nodes)


_EDITS: tuple[Callable[[random.Random, onnx.ModelProto], None], ...] = (
    *(_attribute, _attribute, _new_attribute, _drop_attribute, _input, _input, _swap_inputs, _more_inputs),
    *(_shape, _fitting_shape, _content, _type, _region, _swap_regions, _declared, _rename, _label, _operator),
    *(_drop_node, _repeat_node, _move_node),
)
