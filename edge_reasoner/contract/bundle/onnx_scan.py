"""Reads just enough of an ONNX file's protobuf to see what it would make the runtime open.

onnxruntime resolves the `external_data` of every tensor itself, so a hostile graph could name
`../../etc/passwd` or onnxruntime's in-memory address tag. The device has no `onnx` package; this walker
visits the few message types that can hold tensors or graphs and skips everything else without copying it.

Field numbers (onnx.proto): ModelProto graph 7, training_info 20, functions 25; GraphProto node 1,
initializer 5, sparse_initializer 15; NodeProto op_type 4, attribute 5; AttributeProto t 5,
 g 6, tensors 10, graphs 11,
sparse_tensor 22, sparse_tensors 23; FunctionProto node 7, attribute_proto 11; TrainingInfoProto
initialization 1, algorithm 2; SparseTensorProto values 1, indices 2; TensorProto external_data 13;
StringStringEntryProto key 1, value 2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edge_reasoner.contract.bundle.protobuf import ProtobufError, fields
from edge_reasoner.errors import BundleError

#: More nested graphs, fields or names than this are refused: no real model comes near.
_MAX_DEPTH = 24
_MAX_FIELDS = 4_000_000
_MAX_NAME_BYTES = 4096

#: message type -> {field number of a nested message: its type}
_CHILDREN: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "training": {1: "graph", 2: "graph"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
#: message type -> field numbers of the strings that matter
_STRINGS: Mapping[str, frozenset[int]] = {"node": frozenset({4}), "entry": frozenset({1, 2})}


@dataclass(frozen=True)
class GraphReferences:
    """What a graph names: external data locations and operator types, both sorted."""

    locations: tuple[str, ...]
    op_types: tuple[str, ...]


@dataclass
class _Found:
    locations: set[str] = field(default_factory=set)
    op_types: set[str] = field(default_factory=set)
    fields_left: int = _MAX_FIELDS


def scan_graph(data: memoryview, where: str) -> GraphReferences:
    """Names every external file and operator type of the ONNX model in `data` (uint8 bytes).

    Raises BundleError when the bytes are not a well-formed protobuf or are absurdly nested or numerous.
    """
    found = _Found()
    try:
        _visit("model", data, found, 0)
    except (_MalformedError, ProtobufError) as error:
        raise BundleError(f"{where}: not a readable ONNX file: {error}") from error
    return GraphReferences(tuple(sorted(found.locations)), tuple(sorted(found.op_types)))


class _MalformedError(Exception):
    """A well-formed message that no ONNX file would hold."""


def _visit(kind: str, data: memoryview, found: _Found, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise _MalformedError(f"messages nested more than {_MAX_DEPTH} deep")
    children, strings = _CHILDREN.get(kind, {}), _STRINGS.get(kind, frozenset())
    names: dict[int, str] = {}
    for number, payload in fields(data):
        found.fields_left -= 1
        if found.fields_left < 0:
            raise _MalformedError(f"more than {_MAX_FIELDS} fields")
        if isinstance(payload, int):
            continue
        if number in children:
            _visit(children[number], payload, found, depth + 1)
        elif number in strings:
            names[number] = _text(payload)
            if kind == "node":
                found.op_types.add(names[number])
    # protobuf lets the last occurrence of a field win, as does this dictionary
    if kind == "entry" and names.get(1) == "location":
        found.locations.add(names.get(2, ""))


def _text(payload: memoryview) -> str:
    if len(payload) > _MAX_NAME_BYTES:
        raise _MalformedError(f"a name of {len(payload)} bytes; at most {_MAX_NAME_BYTES} are allowed")
    try:
        return bytes(payload).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _MalformedError("a name is not UTF-8") from error
