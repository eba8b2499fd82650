"""How a graph's nodes read stored weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edge_export.lower.graph import MICROSOFT, GraphWriter
from edge_export.quantize.formats import FloatType
from edge_export.storage.matrices import BlockMatrix, DenseMatrix, StoredMatrix

_IR_FLOAT = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16}


def ir_float(dtype: FloatType) -> ir.DataType:
    """onnx-ir's name of a float type."""
    return _IR_FLOAT[dtype]


class WeightReader:
    """Emits the nodes that read stored weights, for one graph."""

    def __init__(self, graph: GraphWriter, compute: FloatType, accuracy_level: int) -> None:
        self._graph = graph
        self._compute = compute
        self._accuracy_level = accuracy_level
        self._casts: dict[str, ir.Value] = {}

    def vector(self, name: str, stored: DenseMatrix) -> ir.Value:
        """A norm's weight or a bias, in the compute type."""
        return self._dense(name, stored)

    def linear(self, inputs: ir.Value, name: str, stored: StoredMatrix) -> ir.Value:
        """inputs [..., columns] × weightᵀ → [..., rows]."""
        if isinstance(stored, DenseMatrix):
            weight = self._dense(f"{name}.weight", stored)
            return self._graph.node("FusedMatMul", [inputs, weight], name, domain=MICROSOFT, transB=1)
        fmt = stored.format
        packed = self._graph.external(
            f"{name}.weight_q{fmt.bits}",
            stored.packed,
            ir.DataType.UINT8,
            [stored.rows, stored.blocks, fmt.block_size * fmt.bits // 8],
        )
        return self._graph.node(
            "MatMulNBits",
            [inputs, packed, self._scales(name, stored), self._zeros(name, stored)],
            name,
            domain=MICROSOFT,
            K=stored.columns,
            N=stored.rows,
            bits=fmt.bits,
            block_size=fmt.block_size,
            accuracy_level=self._accuracy_level,
        )

    def gather_rows(self, ids: ir.Value, name: str, node_name: str, stored: StoredMatrix) -> ir.Value:
        """Rows of a matrix by id: embeddings. Reads the very bytes that `linear` reads under `name`."""
        if isinstance(stored, DenseMatrix):
            return self._graph.node("Gather", [self._dense(f"{name}.weight", stored), ids], node_name, axis=0)
        fmt = stored.format
        row_bytes = stored.blocks * fmt.block_size * fmt.bits // 8
        # The same region under a second shape: one copy on disk, and mapped memory is shared.
        rows = self._graph.external(
            f"{name}.rows_q{fmt.bits}", stored.packed, ir.DataType.UINT8, [stored.rows, row_bytes]
        )
        padded = stored.blocks * fmt.block_size != stored.columns
        gathered = self._graph.node(
            "GatherBlockQuantized",
            [rows, ids, self._scales(name, stored), self._zeros(name, stored)],
            f"{node_name}_padded" if padded else node_name,
            domain=MICROSOFT,
            bits=fmt.bits,
            block_size=fmt.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        return self._without_padding(gathered, node_name, stored.columns) if padded else gathered

    def _without_padding(self, rows: ir.Value, name: str, columns: int) -> ir.Value:
        """The first `columns` of rows that fill whole blocks."""
        bounds = [
            self._graph.constant(f"{name}_{what}", np.array([value], dtype=np.int64))
            for what, value in (("from", 0), ("to", columns), ("axis", -1))
        ]
        return self._graph.node("Slice", [rows, *bounds], name)

    def _dense(self, name: str, stored: DenseMatrix) -> ir.Value:
        value = self._graph.external(name, stored.region, ir_float(stored.dtype), stored.shape)
        if stored.dtype == self._compute:
            return value
        # Folded once at load: float16 on disk, float32 arithmetic. Readers of the same weights share it.
        if name not in self._casts:
            self._casts[name] = self._graph.node(
                "Cast", [value], f"{name}.cast", to=int(ir_float(self._compute))
            )
        return self._casts[name]

    def _scales(self, name: str, stored: BlockMatrix) -> ir.Value:
        return self._graph.external(
            f"{name}.scales", stored.scales, ir.DataType.FLOAT, [stored.rows, stored.blocks]
        )

    def _zeros(self, name: str, stored: BlockMatrix) -> ir.Value | None:
        if stored.zero_points is None:
            return None
        row_bytes = -(-stored.blocks * stored.format.bits // 8)
        return self._graph.external(
            f"{name}.zero_points", stored.zero_points, ir.DataType.UINT8, [stored.rows, row_bytes]
        )
