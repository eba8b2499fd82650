"""A thin writer over onnx-ir: nodes one by one; weights lie in the external data file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from edge_export.storage.external_data import Region

MICROSOFT = "com.microsoft"


class GraphWriter:
    """Builds one ONNX graph. Values are `onnx_ir.Value`s; names are deterministic."""

    def __init__(self, name: str, data_file: str, opset: int) -> None:
        self._name = name
        self._data_file = data_file
        self._opset = opset
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Declares a graph input; a string dimension is symbolic."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> None:
        """Declares `value` as a graph output under `name`."""
        value.name = name
        value.type = ir.TensorType(dtype)
        value.shape = ir.Shape(shape)
        self._outputs.append(value)

    def node(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Adds a node with one output. None is an absent input."""
        return self.nodes(op, inputs, name, outputs=1, domain=domain, **attributes)[0]

    def nodes(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        name: str,
        *,
        outputs: int,
        domain: str = "",
        **attributes: Any,
    ) -> tuple[ir.Value, ...]:
        """Adds a node with several outputs."""
        node = ir.node(
            op,
            inputs=list(inputs),
            attributes={k: v for k, v in attributes.items() if v is not None},
            domain=domain,
            num_outputs=outputs,
            name=name,
        )
        for index, value in enumerate(node.outputs):
            value.name = f"{name}:{index}" if outputs > 1 else f"{name}:out"
        self._nodes.append(node)
        return tuple(node.outputs)

    def constant(self, name: str, array: NDArray[Any]) -> ir.Value:
        """A small initializer kept inside the graph file."""
        return self._initializer(name, ir.Tensor(array, name=name))

    def external(self, name: str, region: Region, dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """An initializer that lies in the external data file."""
        tensor = ir.ExternalTensor(
            self._data_file, region.offset, region.size_bytes, dtype, name=name, shape=ir.Shape(shape)
        )
        return self._initializer(name, tensor)

    def save(self, path: Path) -> None:
        """Writes the graph file (the data file is written by `ExternalData`)."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports={"": self._opset, MICROSOFT: 1},
            name=self._name,
        )
        model = ir.Model(graph, ir_version=10, producer_name="edge-export")
        path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))

    def _initializer(self, name: str, tensor: Any) -> ir.Value:
        if name in self._initializers:
            return self._initializers[name]
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self._initializers[name] = value
        return value
