"""Lowers a BERT-family encoder to a fused ONNX graph, node by node.

Per layer: packed QKV → MultiHeadAttention (its bias inside, padding masked by key) → output projection →
SkipLayerNormalization (bias inside) → up → BiasGelu (exact erf) → down → SkipLayerNormalization. Pooling and
L2 normalization end the graph. Arithmetic is float32 whatever the weights are stored in. The contract of
inputs and output is `edge_reasoner.contract.bundle.manifest.EncoderSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from edge_export.lower.graph import MICROSOFT, GraphWriter
from edge_export.lower.weights import WeightReader
from edge_export.model.config import EncoderConfig
from edge_export.storage.matrices import DenseMatrix, StoredMatrix


@dataclass(frozen=True)
class EncoderGraphOptions:
    """What a target needs of the graph, beside its weights."""

    opset: int
    #: MatMulNBits: 4 = int8 activations and dot products, 1 = float32
    accuracy_level: int


#: Stored weights by the names of `edge_export.plan.encoder.encoder_weights`.
EncoderWeights = Mapping[str, StoredMatrix]


def write_encoder_graph(
    path: Path, data_file: str, config: EncoderConfig, weights: EncoderWeights, options: EncoderGraphOptions
) -> None:
    """Writes the graph file; weights are already in `data_file` (a name, beside `path`)."""
    _EncoderLowering(data_file, config, weights, options).write(path)


class _EncoderLowering:
    def __init__(
        self, data_file: str, config: EncoderConfig, weights: EncoderWeights, options: EncoderGraphOptions
    ) -> None:
        self._config, self._weights = config, weights
        self._graph = GraphWriter(config.family, data_file, options.opset)
        self._read = WeightReader(self._graph, "float32", options.accuracy_level)

    def write(self, path: Path) -> None:
        """Builds all nodes and saves."""
        graph, config = self._graph, self._config
        ids, mask, types = (
            graph.input(name, ir.DataType.INT64, ["batch", "tokens"])
            for name in ("input_ids", "attention_mask", "token_type_ids")
        )
        key_mask = graph.node("Cast", [mask], "key_mask", to=int(ir.DataType.INT32))
        hidden = self._embed(ids, types)
        for index in range(config.num_layers):
            hidden = self._layer(f"layers.{index}", hidden, key_mask)
        embedding = graph.node("LpNormalization", [self._pool(hidden, mask)], "embedding", axis=-1, p=2)
        graph.output(embedding, "embedding", ir.DataType.FLOAT, ["batch", config.hidden_size])
        graph.save(path)

    def _vector(self, name: str) -> ir.Value:
        stored = self._weights[name]
        assert isinstance(stored, DenseMatrix), name
        return self._read.vector(name, stored)

    def _ints(self, name: str, *values: int) -> ir.Value:
        return self._graph.constant(name, np.array(values, dtype=np.int64))

    def _linear(self, inputs: ir.Value, name: str) -> ir.Value:
        return self._read.linear(inputs, name, self._weights[f"{name}.weight"])

    def _norm(self, inputs: list[ir.Value | None], name: str) -> ir.Value:
        """`inputs` = [input, skip, bias]: norms their sum."""
        value, skip, bias = inputs
        return self._graph.node(
            "SkipLayerNormalization",
            [value, skip, self._vector(f"{name}.weight"), self._vector(f"{name}.bias"), bias],
            name,
            domain=MICROSOFT,
            epsilon=self._config.norm_epsilon,
        )

    def _embed(self, ids: ir.Value, types: ir.Value) -> ir.Value:
        """Word + token type + position, normed: [batch, tokens, hidden]."""
        graph = self._graph
        positions = self._vector("embed.position.weight")
        count = graph.node("Shape", [ids], "token_count", start=1, end=2)
        zero, axis = self._ints("first_position", 0), self._ints("position_axis", 0)
        positions = graph.node("Slice", [positions, zero, count, axis], "positions")
        kinds = graph.node("Gather", [self._vector("embed.token_type.weight"), types], "token_types", axis=0)
        skip = graph.node("Add", [kinds, positions], "token_types_at_positions")
        words = self._read.gather_rows(ids, "embed.word", "words", self._weights["embed.word.weight"])
        return self._norm([words, skip, None], "embed.norm")

    def _layer(self, at: str, hidden: ir.Value, key_mask: ir.Value) -> ir.Value:
        graph = self._graph
        width = self._config.hidden_size
        thirds = self._ints("qkv_sizes", width, width, width)
        packed = self._linear(hidden, f"{at}.qkv")
        query, key, value = graph.nodes("Split", [packed, thirds], f"{at}.qkv_split", outputs=3, axis=-1)
        mixed = graph.node(
            "MultiHeadAttention",
            [query, key, value, self._vector(f"{at}.qkv.bias"), key_mask],
            f"{at}.attention",
            domain=MICROSOFT,
            num_heads=self._config.num_heads,
            # Not -inf: a row without any token stays finite. exp(-1e4) is 0 in float32.
            mask_filter_value=-10_000.0,
        )
        branch = self._linear(mixed, f"{at}.o")
        hidden = self._norm([branch, hidden, self._vector(f"{at}.o.bias")], f"{at}.attn_norm")
        wide = self._linear(hidden, f"{at}.up")
        active = graph.node("BiasGelu", [wide, self._vector(f"{at}.up.bias")], f"{at}.act", domain=MICROSOFT)
        branch = self._linear(active, f"{at}.down")
        return self._norm([branch, hidden, self._vector(f"{at}.down.bias")], f"{at}.mlp_norm")

    def _pool(self, hidden: ir.Value, mask: ir.Value) -> ir.Value:
        """[batch, hidden], up to a factor that the normalization takes away."""
        graph = self._graph
        if self._config.pooling == "cls":
            first = graph.constant("cls_position", np.array(0, dtype=np.int64))
            return graph.node("Gather", [hidden, first], "pooled", axis=1)
        weight = graph.node("Cast", [mask], "token_weight", to=int(ir.DataType.FLOAT))
        # The sum over tokens as [batch, 1, tokens] × [batch, tokens, hidden]; dividing it by their number
        # would change nothing after normalization.
        row = graph.node("Unsqueeze", [weight, self._ints("weight_axis", 1)], "token_weight_row")
        total = graph.node("MatMul", [row, hidden], "token_sum")
        return graph.node("Squeeze", [total, self._ints("sum_axis", 1)], "pooled")
