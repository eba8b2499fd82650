"""The one reader of ONNX files on the device: strict, by allow-list, without the `onnx` package.

onnxruntime resolves the external data of every tensor itself and runs whatever a graph says, so a hostile
graph could name `../../etc/passwd` or loop for ever. Two readers that understand the same bytes differently
would be a way around every check made here. So a file is accepted only if it is in protobuf's canonical form
for the few messages and fields that the exporter writes: each field known and of its type, in the order of
their numbers, none twice unless it repeats, numbers in their shortest form, nothing left over. Such bytes are
what protobuf's own writer would make of the values read here, byte for byte (the tests compare them with the
`onnx` package's writer), so every reader of protobuf sees these values and no others. That is as good as
handing the runtime a file written anew, without a second piece of code that would have to be right, and the
file keeps its digest.

Left out on purpose, hence refused: functions, training info, sparse and typed tensor contents, attributes
that hold tensors or graphs (no `If`, `Loop` or `Scan` can be written), metadata, document strings, devices.

Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from edge_reasoner.contract.bundle.protobuf import ProtobufError, keyed_fields
from edge_reasoner.errors import BundleError

#: A graph file larger than this is refused unread; one of 64 layers has about 300 kB.
MAX_GRAPH_BYTES = 4 << 20
#: More nodes, initializers or values than this are refused: no real model comes near.
_MANY = 65_536
#: Inputs, outputs or attributes of one node; entries of a small message.
_FEW = 16
_MAX_RANK = 4
_MAX_DIM = 1 << 40
_MAX_INLINE_BYTES = 4096
#: What may stand in a name: it may be shown on a terminal, and a file may be named by it.
_NAME = re.compile(r"[A-Za-z0-9_.:/+-]{1,256}\Z")
_DECIMAL = re.compile(r"(0|[1-9][0-9]{0,17})\Z")

FLOAT, UINT8, INT32, INT64, BOOL, FLOAT16 = 1, 2, 6, 7, 9, 10
#: TensorProto.DataType -> bytes of an element; the types that an initializer may have
ITEM_BYTES: Final[Mapping[int, int]] = {FLOAT: 4, UINT8: 1, INT64: 8, FLOAT16: 2}
_DECLARED_TYPES = frozenset({FLOAT, UINT8, INT32, INT64, FLOAT16})
#: domain -> the versions of its operators that graphs are written in and the runtimes know
_OPSETS: Final[Mapping[str, range]] = {"": range(17, 27), "com.microsoft": range(1, 2)}
_IR_VERSIONS = range(8, 14)

Dim = int | str
Attribute = int | float | str
T = TypeVar("T")


@dataclass(frozen=True)
class External:
    """Where an initializer lies: a file (as written in the graph, relative to it), and bytes in it."""

    location: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Tensor:
    """An initializer: `data` inside the graph, or external. Its size is what type and shape say."""

    name: str
    type: int
    shape: tuple[int, ...]
    data: bytes
    external: External | None

    @property
    def size_bytes(self) -> int:
        """Bytes of its content."""
        return len(self.data) if self.external is None else self.external.size_bytes


@dataclass(frozen=True)
class Declared:
    """A named value with its type and shape; a dimension is a number or a symbol."""

    name: str
    type: int
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Node:
    """An operator's call. An absent input or unused output is ""."""

    op_type: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Attribute]


@dataclass(frozen=True)
class OnnxModel:
    """All that a graph file says."""

    opsets: Mapping[str, int]
    nodes: tuple[Node, ...]
    initializers: tuple[Tensor, ...]
    inputs: tuple[Declared, ...]
    outputs: tuple[Declared, ...]
    #: types of initializers, said once more
    declared: tuple[Declared, ...]

    @property
    def locations(self) -> tuple[str, ...]:
        """Every external file that it names, sorted."""
        return tuple(sorted({t.external.location for t in self.initializers if t.external is not None}))

    @property
    def op_types(self) -> tuple[str, ...]:
        """Every operator that it calls, sorted."""
        return tuple(sorted({node.op_type for node in self.nodes}))


class _RefusedError(ValueError):
    """A well-formed message that the exporter would not write."""


#: kind of message and its bytes -> what was read of them: graphs of one bundle have most of theirs in common
Known = dict[tuple[str, bytes], Any]


def scan_graph(data: bytes | memoryview, where: str, known: Known | None = None) -> OnnxModel:
    """Reads the ONNX model in `data` (uint8 bytes), all of it.

    `known` may be shared by several calls, which then read equal parts once. Raises BundleError unless it
    is canonical protobuf of nothing but allowed messages and fields, within the limits of this module.
    """
    if len(data) > MAX_GRAPH_BYTES:
        raise BundleError(f"{where}: {len(data)} bytes; a graph has at most {MAX_GRAPH_BYTES}")
    try:
        return _Reader({} if known is None else known).model(bytes(data))
    except (_RefusedError, ProtobufError) as error:
        raise BundleError(f"{where}: not a readable ONNX file: {error}") from error


@dataclass(frozen=True)
class _Field:
    name: str
    #: of the bytes, the unsigned number or the four bytes of a float
    convert: Callable[[Any], Any]
    #: how often it may stand there; 1: it does not repeat
    most: int = 1


def _text(data: bytes) -> str:
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError as error:
        raise _RefusedError("a name is not plain ASCII") from error
    if not _NAME.match(text):
        raise _RefusedError(f"a name of {len(text)} characters, {text[:40]!r}, is not allowed")
    return text


def _text_or_empty(data: bytes) -> str:
    return _text(data) if data else ""


def _ascii(data: bytes) -> str:
    """Where a text is compared with known ones only."""
    return data.decode("ascii", "backslashreplace")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _float(data: bytes) -> float:
    value: float = struct.unpack("<f", data)[0]
    return value


def _unchanged(value: T) -> T:
    return value


def _varint(number: int) -> int:
    return number << 3


def _bytes(number: int) -> int:
    return number << 3 | 2


_Schema = Mapping[int, _Field]
_OPSET: _Schema = {_bytes(1): _Field("domain", _text_or_empty), _varint(2): _Field("version", _unchanged)}
_NODE: _Schema = {
    _bytes(1): _Field("inputs", _text_or_empty, _FEW),
    _bytes(2): _Field("outputs", _text_or_empty, _FEW),
    _bytes(3): _Field("name", _text_or_empty),
    _bytes(4): _Field("op_type", _text),
    _bytes(5): _Field("attributes", _unchanged, _FEW),
    _bytes(7): _Field("domain", _text_or_empty),
}
_ATTRIBUTE: _Schema = {
    _bytes(1): _Field("name", _text),
    2 << 3 | 5: _Field("f", _float),
    _varint(3): _Field("i", _signed),
    _bytes(4): _Field("s", _text),
    _varint(20): _Field("type", _unchanged),
}
#: AttributeProto.type -> the field that holds the value
_ATTRIBUTE_TYPES: Mapping[int, str] = {1: "f", 2: "i", 3: "s"}
_TENSOR: _Schema = {
    _varint(1): _Field("dims", _unchanged, _FEW),
    _varint(2): _Field("type", _unchanged),
    _bytes(8): _Field("name", _text),
    _bytes(9): _Field("data", _unchanged),
    _bytes(13): _Field("external", _unchanged, _FEW),
    _varint(14): _Field("data_location", _unchanged),
}
_ENTRY: _Schema = {_bytes(1): _Field("key", _ascii), _bytes(2): _Field("value", _ascii)}
_VALUE: _Schema = {_bytes(1): _Field("name", _text), _bytes(2): _Field("type", _unchanged)}
_TYPE: _Schema = {_bytes(1): _Field("tensor", _unchanged)}
_TENSOR_TYPE: _Schema = {_varint(1): _Field("type", _unchanged), _bytes(2): _Field("shape", _unchanged)}
_SHAPE: _Schema = {_bytes(1): _Field("dims", _unchanged, _FEW)}
_DIM: _Schema = {_varint(1): _Field("value", _unchanged), _bytes(2): _Field("symbol", _text)}
_GRAPH: _Schema = {
    _bytes(1): _Field("nodes", _unchanged, _MANY),
    _bytes(2): _Field("name", _text),
    _bytes(5): _Field("initializers", _unchanged, _MANY),
    _bytes(11): _Field("inputs", _unchanged, _MANY),
    _bytes(12): _Field("outputs", _unchanged, _MANY),
    _bytes(13): _Field("declared", _unchanged, _MANY),
}
_MODEL: _Schema = {
    _varint(1): _Field("ir_version", _unchanged),
    _bytes(2): _Field("producer_name", _text),
    _bytes(3): _Field("producer_version", _text),
    _bytes(7): _Field("graph", _unchanged),
    _bytes(8): _Field("opsets", _unchanged, _FEW),
}


def _decode(data: bytes, schema: _Schema, kind: str) -> dict[str, Any]:
    """The message's fields by name; repeated ones as lists. Refuses what is not canonical or not known."""
    found: dict[str, Any] = {}
    last = 0
    for key, value in keyed_fields(data):
        field = schema.get(key)
        if field is None:
            raise _RefusedError(f"{kind}: field {key >> 3} (wire type {key & 7}) is not one that is allowed")
        if key < last:
            raise _RefusedError(f"{kind}: field {key >> 3} is not in canonical order")
        if field.most > 1:
            items = found.setdefault(field.name, [])
            if len(items) >= field.most:
                raise _RefusedError(f"{kind}: more than {field.most} {field.name}")
            items.append(field.convert(value))
        elif key == last:
            raise _RefusedError(f"{kind}: field {key >> 3} stands there twice")
        else:
            found[field.name] = field.convert(value)
        last = key
    return found


def _require(found: Mapping[str, Any], kind: str, *names: str) -> None:
    for name in names:
        if name not in found:
            raise _RefusedError(f"{kind}: it has no {name}")


class _Reader:
    """One call of `scan_graph`."""

    def __init__(self, known: Known) -> None:
        self._known = known

    def model(self, data: bytes) -> OnnxModel:
        found = _decode(data, _MODEL, "model")
        _require(found, "model", "ir_version", "graph", "opsets")
        if found["ir_version"] not in _IR_VERSIONS:
            raise _RefusedError(f"model: IR version {found['ir_version']} is not allowed")
        opsets: dict[str, int] = {}
        for item in found["opsets"]:
            entry = _decode(item, _OPSET, "opset")
            domain, version = entry.get("domain", ""), entry.get("version", 0)
            if domain in opsets or version not in _OPSETS.get(domain, ()):
                raise _RefusedError(f"opset: version {version} of {domain!r} is not allowed")
            opsets[domain] = version
        graph = _decode(found["graph"], _GRAPH, "graph")
        _require(graph, "graph", "nodes", "name", "inputs", "outputs")
        return OnnxModel(
            opsets=opsets,
            nodes=self._all("node", graph["nodes"], self._node),
            initializers=self._all("initializer", graph.get("initializers", ()), _tensor),
            inputs=self._all("value", graph["inputs"], _declared),
            outputs=self._all("value", graph["outputs"], _declared),
            declared=self._all("value", graph.get("declared", ()), _declared),
        )

    def _all(self, kind: str, items: list[bytes], read: Callable[[bytes], T]) -> tuple[T, ...]:
        return tuple(self._once(kind, data, read) for data in items)

    def _once(self, kind: str, data: bytes, read: Callable[[bytes], T]) -> T:
        key = kind, data
        value: T | None = self._known.get(key)
        if value is None:
            value = self._known[key] = read(data)
        return value

    def _node(self, data: bytes) -> Node:
        found = _decode(data, _NODE, "node")
        _require(found, "node", "op_type", "outputs")
        attributes: dict[str, Attribute] = {}
        for item in found.get("attributes", ()):
            name, value = self._once("attribute", item, _attribute)
            if name in attributes:
                raise _RefusedError(f"node {found.get('name', '')!r}: attribute {name} stands there twice")
            attributes[name] = value
        return Node(
            op_type=found["op_type"],
            domain=found.get("domain", ""),
            name=found.get("name", ""),
            inputs=tuple(found.get("inputs", ())),
            outputs=tuple(found["outputs"]),
            attributes=attributes,
        )


def _attribute(data: bytes) -> tuple[str, Attribute]:
    found = _decode(data, _ATTRIBUTE, "attribute")
    _require(found, "attribute", "name", "type")
    value_field = _ATTRIBUTE_TYPES.get(found["type"])
    if value_field is None or found.keys() != {"name", "type", value_field}:
        raise _RefusedError(f"attribute {found['name']}: only one number or one text is allowed")
    return found["name"], found[value_field]


def _tensor(data: bytes) -> Tensor:
    found = _decode(data, _TENSOR, "initializer")
    _require(found, "initializer", "name", "type")
    name, shape = found["name"], tuple(found.get("dims", ()))
    if found["type"] not in ITEM_BYTES:
        raise _RefusedError(f"initializer {name}: data type {found['type']} is not allowed")
    if len(shape) > _MAX_RANK or not all(1 <= dim <= _MAX_DIM for dim in shape):
        raise _RefusedError(f"initializer {name}: its shape is not allowed")
    wanted_bytes = ITEM_BYTES[found["type"]]
    for dim in shape:
        wanted_bytes *= dim
    if found.get("data_location", 0) == 1 and "data" not in found:
        external = _external(found.get("external", []), name)
        size_bytes = external.size_bytes
    elif found.keys() <= {"name", "type", "dims", "data"} and "data" in found:
        external, size_bytes = None, len(found["data"])
        if size_bytes > _MAX_INLINE_BYTES:
            raise _RefusedError(f"initializer {name}: {size_bytes} bytes inside the graph file")
    else:
        raise _RefusedError(f"initializer {name}: it must be raw data or one external region")
    if size_bytes != wanted_bytes:
        raise _RefusedError(
            f"initializer {name}: {size_bytes} bytes; its type and shape ask for {wanted_bytes}"
        )
    return Tensor(name, found["type"], shape, found.get("data", b""), external)


def _external(items: list[bytes], name: str) -> External:
    entries = [_decode(item, _ENTRY, "external data") for item in items]
    if [entry.get("key") for entry in entries] != ["location", "offset", "length"]:
        raise _RefusedError(f"initializer {name}: external data must be location, offset and length")
    location, offset, length = (entry.get("value", "") for entry in entries)
    if not (_DECIMAL.match(offset) and _DECIMAL.match(length)):
        raise _RefusedError(f"initializer {name}: offset and length must be plain decimal numbers")
    return External(location, int(offset), int(length))


def _declared(data: bytes) -> Declared:
    value = _decode(data, _VALUE, "value")
    _require(value, "value", "name", "type")
    outer = _decode(value["type"], _TYPE, "type")
    _require(outer, "type", "tensor")
    inner = _decode(outer["tensor"], _TENSOR_TYPE, "tensor type")
    _require(inner, "tensor type", "type", "shape")
    if inner["type"] not in _DECLARED_TYPES:
        raise _RefusedError(f"value {value['name']}: data type {inner['type']} is not allowed")
    dims: list[Dim] = []
    for item in _decode(inner["shape"], _SHAPE, "shape").get("dims", ()):
        dim = _decode(item, _DIM, "dimension")
        if len(dim) != 1 or not 1 <= dim.get("value", 1) <= _MAX_DIM:
            raise _RefusedError(f"value {value['name']}: a dimension must be one number or one symbol")
        dims.append(dim.get("value") or dim["symbol"])
    if len(dims) > _MAX_RANK:
        raise _RefusedError(f"value {value['name']}: more than {_MAX_RANK} dimensions")
    return Declared(value["name"], inner["type"], tuple(dims))
