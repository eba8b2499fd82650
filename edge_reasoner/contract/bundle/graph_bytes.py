"""How many bytes of a graph's weights one decode step reads.

Tables of which a step reads single rows (an untied input embedding, rotary tables) are not streamed.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_reasoner.contract.bundle.onnx_scan import MAX_GRAPH_BYTES, OnnxModel, scan_graph
from edge_reasoner.contract.bundle.open import Bundle

#: operators that read single rows of the tables given to them
_ROW_READERS = frozenset({"Gather", "GatherBlockQuantized", "GroupQueryAttention"})


@dataclass(frozen=True)
class GraphBytes:
    """`stored`: the graph and its weights as files; `streamed`: the part that each decode step reads."""

    stored: int
    streamed: int


def graph_bytes(bundle: Bundle, graph: str) -> GraphBytes:
    """Of a graph that the manifest lists. Raises BundleError when it cannot be read."""
    model = scan_graph(bundle.read_bytes(graph, MAX_GRAPH_BYTES), graph)
    files = {graph, *bundle.weights[graph]}
    return GraphBytes(sum(bundle.entry(name).size_bytes for name in files), _streamed(model))


def _streamed(model: OnnxModel) -> int:
    by_rows: set[str] = set()
    whole: set[str] = set()
    for node in model.nodes:
        (by_rows if node.op_type in _ROW_READERS else whole).update(node.inputs)
    return sum(
        tensor.size_bytes
        for tensor in model.initializers
        if tensor.name in whole or tensor.name not in by_rows
    )
