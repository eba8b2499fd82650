"""How many bytes of a graph's weights one decode step reads.

Tables of which a step reads single rows (an untied input embedding, rotary tables) are not streamed. Meant
for a bundle that `open_bundle` has checked; field numbers as in `onnx_scan`, and NodeProto input 1,
TensorProto raw_data 9, name 8.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edge_reasoner.contract.bundle.onnx_scan import MAX_GRAPH_BYTES
from edge_reasoner.contract.bundle.open import Bundle
from edge_reasoner.contract.bundle.protobuf import fields

#: operators that read single rows of the tables given to them
_ROW_READERS = frozenset({"Gather", "GatherBlockQuantized", "GroupQueryAttention", "RotaryEmbedding"})
_GRAPH, _NODE, _INITIALIZER = 7, 1, 5
_NODE_INPUT, _NODE_OP_TYPE = 1, 4
_TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 8, 9, 13


@dataclass(frozen=True)
class GraphBytes:
    """`stored`: the graph and its weights as files; `streamed`: the part that each decode step reads."""

    stored: int
    streamed: int


def graph_bytes(bundle: Bundle, graph: str) -> GraphBytes:
    """Of a graph that the manifest lists. Raises BundleError when it cannot be read."""
    data = memoryview(bundle.read_bytes(graph, MAX_GRAPH_BYTES))
    streamed = sum(_streamed(data))
    files = {graph, *bundle.weights[graph]}
    return GraphBytes(sum(bundle.entry(name).size_bytes for name in files), streamed)


def _streamed(model: memoryview) -> Iterator[int]:
    sizes: dict[str, int] = {}
    by_rows: set[str] = set()
    whole: set[str] = set()
    for graph in _messages(model, _GRAPH):
        for tensor in _messages(graph, _INITIALIZER):
            sizes[_text(tensor, _TENSOR_NAME)] = _tensor_bytes(tensor)
        for node in _messages(graph, _NODE):
            inputs = {str(value, "utf-8") for value in _messages(node, _NODE_INPUT)}
            (by_rows if _text(node, _NODE_OP_TYPE) in _ROW_READERS else whole).update(inputs)
    for name, size in sizes.items():
        if name in whole or name not in by_rows:
            yield size


def _tensor_bytes(tensor: memoryview) -> int:
    raw = sum(len(value) for value in _messages(tensor, _TENSOR_RAW))
    external = 0
    for entry in _messages(tensor, _TENSOR_EXTERNAL):
        if _text(entry, 1) == "length":
            external = int(_text(entry, 2))
    return raw + external


def _text(message: memoryview, number: int) -> str:
    text = b""
    for value in _messages(message, number):
        text = bytes(value)  # the last occurrence counts
    return text.decode("utf-8")


def _messages(data: memoryview, wanted: int) -> Iterator[memoryview]:
    """Length-delimited fields of that number."""
    for number, value in fields(data):
        if number == wanted and isinstance(value, memoryview):
            yield value
