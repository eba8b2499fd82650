"""Is a graph wired as the exporter wires it? Types and shapes of all its values, from its inputs on.

Every operator is one of the tables in `onnx_operators` and `onnx_contrib`, and its rule accepts its inputs;
every value has one name and is made before it is read; inputs and outputs are those of the contract
(`DecoderSpec`, `EncoderSpec`), and each layer's cache goes through one attention.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Mapping
from typing import Final

from edge_reasoner.contract.bundle.manifest import DecoderSpec, EncoderSpec
from edge_reasoner.contract.bundle.onnx_contrib import MICROSOFT
from edge_reasoner.contract.bundle.onnx_operators import STANDARD
from edge_reasoner.contract.bundle.onnx_scan import (
    FLOAT,
    FLOAT16,
    INT32,
    INT64,
    Declared,
    Node,
    OnnxModel,
    Tensor,
)
from edge_reasoner.contract.bundle.onnx_values import (
    Call,
    Operator,
    RuleError,
    Shape,
    Value,
    check_size,
    require,
)

_OPERATORS: Final[Mapping[str, Mapping[str, Operator]]] = {"": STANDARD, "com.microsoft": MICROSOFT}
#: The exporter writes up to 30 nodes a layer. More would be work that no weights account for.
_NODES_PER_LAYER, _NODES_BESIDE = 64, 128
_MAX_LAYERS = 1024
_KV_TYPES = {"float32": FLOAT, "float16": FLOAT16}

Signature = Mapping[str, tuple[int, Shape]]


def check_wiring(model: OnnxModel, spec: DecoderSpec | EncoderSpec) -> Mapping[str, Value]:
    """Every value of the graph by name.

    Raises RuleError, which names the node, unless the graph is one that the exporter writes of `spec`.
    """
    require(set(model.opsets) == set(_OPERATORS), "it must import the standard operators and com.microsoft's")
    for node in model.nodes:
        if node.op_type not in _OPERATORS.get(node.domain, ()):
            raise RuleError(f"operator {node.op_type!r} is not allowed in a bundle")
    layers = sum(node.op_type in _ATTENTIONS for node in model.nodes)
    require(layers <= _MAX_LAYERS, f"{layers} layers; at most {_MAX_LAYERS} are allowed")
    require(
        len(model.nodes) <= _NODES_PER_LAYER * layers + _NODES_BESIDE,
        f"{len(model.nodes)} nodes are too many for {layers} layers",
    )
    inputs, outputs = (_decoder if isinstance(spec, DecoderSpec) else _encoder)(spec, model)
    _check_signature("input", model.inputs, inputs)
    _check_signature("output", model.outputs, outputs)
    values = _infer(model, inputs)
    _check_outputs(model, outputs, values)
    _check_tables(model, spec, values)
    if isinstance(spec, DecoderSpec):
        _check_caches(model.nodes, len(spec.kv_heads))
    return values


_ATTENTIONS = frozenset({"GroupQueryAttention", "MultiHeadAttention"})
_PRODUCTS = frozenset({"FusedMatMul", "MatMulNBits"})
#: outputs that a node need not have
_UNUSED = frozenset({("SkipSimplifiedLayerNormalization", 1), ("SkipSimplifiedLayerNormalization", 2)})


def _decoder(spec: DecoderSpec | EncoderSpec, model: OnnxModel) -> tuple[Signature, Signature]:
    assert isinstance(spec, DecoderSpec)
    inputs: dict[str, tuple[int, Shape]] = {
        "input_ids": (INT64, ("batch", "tokens")),
        "seqlens_k": (INT32, ("batch",)),
        "total_sequence_length": (INT32, ()),
        "logits_to_keep": (INT64, (1,)),
        "states_to_keep": (INT64, (1,)),
    }
    outputs: dict[str, tuple[int, Shape]] = {
        "logits": (FLOAT, ("batch", "kept", spec.vocab_size)),
        "hidden_last": (FLOAT, ("batch", spec.hidden_size)),
        "hidden_sum": (FLOAT, ("batch", spec.hidden_size)),
    }
    first = next((value for value in model.inputs if value.name == "past_key_values.0.key"), None)
    room = first.shape[2] if first is not None and len(first.shape) == 4 else "context"
    require(
        room == "context" or (isinstance(room, int) and room >= spec.context_tokens),
        f"its KV cache holds {room} tokens, not {spec.context_tokens}",
    )
    kv_type = _KV_TYPES[spec.kv_dtype]
    for layer, (heads, size) in enumerate(zip(spec.kv_heads, spec.head_dim, strict=True)):
        for side in ("key", "value"):
            inputs[f"past_key_values.{layer}.{side}"] = (kv_type, ("batch", heads, room, size))
            outputs[f"present.{layer}.{side}"] = (kv_type, ("batch", heads, room, size))
    return inputs, outputs


def _encoder(spec: DecoderSpec | EncoderSpec, model: OnnxModel) -> tuple[Signature, Signature]:
    assert isinstance(spec, EncoderSpec)
    names = ("input_ids", "attention_mask", "token_type_ids")
    return (
        dict.fromkeys(names, (INT64, ("batch", "tokens"))),
        {"embedding": (FLOAT, ("batch", spec.dimension))},
    )


def _check_signature(kind: str, found: tuple[Declared, ...], wanted: Signature) -> None:
    names = [value.name for value in found]
    require(len(set(names)) == len(names), f"two {kind}s have one name")
    if odd := sorted(set(names) ^ wanted.keys()):
        state = "missing" if odd[0] in wanted else "unexpected"
        raise RuleError(f"{kind} {odd[0]!r} is {state}")
    for value in found:
        if (value.type, value.shape) != wanted[value.name]:
            raise RuleError(
                f"{kind} {value.name!r} is of type {value.type} and shape {list(value.shape)}; the manifest's"
                f" spec asks for {wanted[value.name][0]} and {list(wanted[value.name][1])}"
            )


def _infer(model: OnnxModel, inputs: Signature) -> dict[str, Value]:
    """Every value by name."""
    values = {name: Value(kind, shape, source=name) for name, (kind, shape) in inputs.items()}
    for tensor in model.initializers:
        _add(values, tensor.name, _stored(tensor))
    _check_declared(model.declared, values)
    converted: set[str] = set()
    for node in model.nodes:
        for name, value in zip(node.outputs, _call(node, values), strict=True):
            if name:
                _add(values, name, value)
        if node.op_type == "Cast" and (source := values[node.inputs[0]]).stored:
            # a stored tensor is converted when the graph is loaded, and kept: once is enough for all readers
            once = source.initializer and node.inputs[0] not in converted
            require(once, f"{node.inputs[0]!r} is converted twice")
            converted.add(node.inputs[0])
    multiplied = Counter(node.inputs[1] for node in model.nodes if node.op_type in _PRODUCTS)
    if twice := next((name for name, count in multiplied.items() if count > 1), None):
        # so the work for a token is bounded by the weights' size
        raise RuleError(f"{twice!r} is multiplied with twice")
    read = {name for node in model.nodes for name in node.inputs}
    if unread := next((tensor.name for tensor in model.initializers if tensor.name not in read), None):
        raise RuleError(f"initializer {unread!r} is read by no node")
    return values


def _add(values: dict[str, Value], name: str, value: Value) -> None:
    if name in values:
        raise RuleError(f"two values are called {name!r}")
    values[name] = value


def _stored(tensor: Tensor) -> Value:
    content = None
    if tensor.type == INT64:
        require(tensor.external is None, f"initializer {tensor.name!r}: integers must lie inside the graph")
        content = struct.unpack(f"<{len(tensor.data) // 8}q", tensor.data)
    return Value(tensor.type, tensor.shape, stored=True, initializer=True, content=content)


def _check_declared(declared: tuple[Declared, ...], values: Mapping[str, Value]) -> None:
    """What is said of initializers once more must be the same."""
    names = [value.name for value in declared]
    require(len(set(names)) == len(names), "a value is declared twice")
    for value in declared:
        stored = values.get(value.name)
        same = stored is not None and stored.type == value.type and stored.shape == value.shape
        if stored is None or not same or not stored.initializer:
            raise RuleError(f"value {value.name!r} is declared as something else than it is")


def _call(node: Node, values: Mapping[str, Value]) -> tuple[Value, ...]:
    operator = _OPERATORS[node.domain][node.op_type]
    try:
        operator.check(node)
        results = operator.rule(Call(node, tuple([values[name] if name else None for name in node.inputs])))
        for index, (name, result) in enumerate(zip(node.outputs, results, strict=True)):
            if name:
                check_size(result)
            elif (node.op_type, index) not in _UNUSED:
                raise RuleError(f"output {index} has no name")
    except KeyError as error:
        raise RuleError(f"node {_show(node)}: its input {error} is made nowhere before it") from error
    except RuleError as error:
        raise RuleError(f"node {_show(node)}: {error}") from error
    return results


def _show(node: Node) -> str:
    return f"{node.name or node.outputs[0]!r} ({node.op_type})"


def _check_outputs(model: OnnxModel, outputs: Signature, values: Mapping[str, Value]) -> None:
    made = {name for node in model.nodes for name in node.outputs}
    for name, (kind, shape) in outputs.items():
        require(name in made, f"output {name!r} is made by no node")
        inferred = tuple("kept" if dim == "logits_to_keep" else dim for dim in values[name].shape)
        require(
            (values[name].type, inferred) == (kind, shape),
            f"output {name!r} has the shape {list(inferred)}, not {list(shape)}",
        )


def _check_tables(model: OnnxModel, spec: DecoderSpec | EncoderSpec, values: Mapping[str, Value]) -> None:
    """Tables have a row for all that may be looked up in them."""
    for node in model.nodes:
        needed: list[tuple[int, int]] = []
        if node.op_type in ("Gather", "GatherBlockQuantized") and node.inputs[1] == "input_ids":
            needed = [(0, spec.vocab_size)]
        elif node.op_type == "GroupQueryAttention":
            needed = [(7, spec.context_tokens), (8, spec.context_tokens)]
        elif node.op_type == "Slice" and values[node.inputs[0]].stored:
            needed = [(0, spec.context_tokens)]
        for index, rows in needed:
            there = values[node.inputs[index]].shape[0]
            require(
                isinstance(there, int) and there >= rows,
                f"node {_show(node)}: input {index} is a table of {there} rows; {rows} are needed",
            )


def _check_caches(nodes: tuple[Node, ...], layers: int) -> None:
    """Layer i's attention reads and writes layer i's cache, and nothing else touches a cache."""
    attentions = [node for node in nodes if node.op_type == "GroupQueryAttention"]
    wanted = [
        tuple(
            f"{what}.{layer}.{side}" for what in ("past_key_values", "present") for side in ("key", "value")
        )
        for layer in range(layers)
    ]
    found = [(*node.inputs[3:5], *node.outputs[1:3]) for node in attentions]
    require(found == wanted, "its attentions are not wired one to each layer's cache")
    read = Counter(name for node in nodes for name in node.inputs)
    for past in (name for names in wanted for name in names):
        require(read[past] == past.startswith("past"), f"{past!r} is read by another node")
