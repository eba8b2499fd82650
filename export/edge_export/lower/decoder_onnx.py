"""Lowers a decoder to a fused ONNX graph, node by node.

Per layer: SkipSimplifiedLayerNormalization → packed QKV → GroupQueryAttention (rotary inside, KV buffers
shared between past and present) → output projection → SkipSimplifiedLayerNormalization → gated MLP. Tied
embeddings exist once. Only the positions that the caller wants states of reach the last layer's MLP and the
final norm, only those it wants logits of the head.
The contract of inputs and outputs is `edge_reasoner.contract.bundle.manifest.DecoderSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from edge_export.lower.graph import MICROSOFT, GraphWriter
from edge_export.lower.weights import WeightReader, ir_float
from edge_export.model.config import DecoderConfig, LayerConfig, Rope
from edge_export.model.rope import rope_tables
from edge_export.quantize.formats import FloatType
from edge_export.storage.external_data import ExternalData
from edge_export.storage.matrices import (
    DenseMatrix,
    StoredMatrix,
    store_dense,
)

_LAST = np.iinfo(np.int64).max
#: Added to the score of a key outside the window: exp of it is 0 beside any real score, and float16 holds it.
_HIDDEN_BIAS = -30_000.0


@dataclass(frozen=True)
class GraphOptions:
    """What a target needs of the graph, beside its weights."""

    opset: int
    context_tokens: int
    #: arithmetic and KV cache type
    compute: FloatType
    #: MatMulNBits: 4 = int8 activations and dot products, 1 = float32
    accuracy_level: int


#: Matrices and vectors by graph name: `embed`, `layers.{i}.qkv|qkv_bias|q_norm|k_norm|o|gate|up|down`,
#: `layers.{i}.attn_norm|attn_post_norm|mlp_norm|mlp_post_norm`, `norm`, and `head` unless tied.
StoredWeights = Mapping[str, StoredMatrix]
RopeTables = Mapping[Rope, tuple[DenseMatrix, DenseMatrix]]


def store_rope_tables(
    data: ExternalData, config: DecoderConfig, context_tokens: int, dtype: FloatType
) -> dict[Rope, tuple[DenseMatrix, DenseMatrix]]:
    """Writes cos and sin tables [context, head_dim/2], once for each distinct rotary embedding."""
    tables: dict[Rope, tuple[DenseMatrix, DenseMatrix]] = {}
    for layer in config.layers:
        if layer.rope not in tables:
            cos, sin = rope_tables(layer.rope, layer.head_dim, torch.arange(context_tokens))
            tables[layer.rope] = store_dense(data, cos, dtype), store_dense(data, sin, dtype)
    return tables


def write_decoder_graph(
    path: Path,
    data_file: str,
    config: DecoderConfig,
    weights: StoredWeights,
    ropes: RopeTables,
    options: GraphOptions,
) -> None:
    """Writes the graph file; weights are already in `data_file`."""
    _DecoderLowering(data_file, config, weights, ropes, options).write(path)


class _DecoderLowering:
    def __init__(
        self,
        data_file: str,
        config: DecoderConfig,
        weights: StoredWeights,
        ropes: RopeTables,
        options: GraphOptions,
    ) -> None:
        self._config, self._weights, self._ropes, self._options = config, weights, ropes, options
        self._graph = GraphWriter(config.family, data_file, options.opset)
        self._read = WeightReader(self._graph, options.compute, options.accuracy_level)
        self._windows: dict[int, ir.Value] = {}

    def write(self, path: Path) -> None:
        """Builds all nodes and saves."""
        graph, config = self._graph, self._config
        ids = graph.input("input_ids", ir.DataType.INT64, ["batch", "tokens"])
        seqlens = graph.input("seqlens_k", ir.DataType.INT32, ["batch"])
        total = graph.input("total_sequence_length", ir.DataType.INT32, [])
        keep = graph.input("logits_to_keep", ir.DataType.INT64, [1])
        states = graph.input("states_to_keep", ir.DataType.INT64, [1])
        hidden = self._embed(ids)
        residual: ir.Value = hidden
        branch: ir.Value | None = None
        presents: list[tuple[ir.Value, ir.Value]] = []
        for index, layer in enumerate(config.layers):
            normed, residual = self._norm(branch, residual, f"layers.{index}.attn_norm")
            window = self._window(layer, ids, seqlens, total)
            branch, present = self._attention(index, layer, normed, seqlens, total, window)
            presents.append(present)
            if index == len(config.layers) - 1:
                branch = self._last_positions(branch, states, "states_branch")
                residual = self._last_positions(residual, states, "states_residual")
            normed, residual = self._norm(branch, residual, f"layers.{index}.mlp_norm")
            branch = self._mlp(index, normed)
        normed, _ = self._norm(branch, residual, "norm")
        logits = self._head(self._last_positions(normed, keep, "kept"))
        graph.output(logits, "logits", ir.DataType.FLOAT, ["batch", "kept", config.vocab_size])
        self._hidden_outputs(normed)
        for index, (layer, present) in enumerate(zip(config.layers, presents, strict=True)):
            for kind, value in zip(("key", "value"), present, strict=True):
                graph.output(value, f"present.{index}.{kind}", self._float, self._kv_shape(layer))
        graph.save(path)

    @property
    def _float(self) -> ir.DataType:
        return ir_float(self._options.compute)

    def _kv_shape(self, layer: LayerConfig) -> list[int | str]:
        return ["batch", layer.num_kv_heads, self._options.context_tokens, layer.head_dim]

    def _scalar(self, name: str, value: float) -> ir.Value:
        dtype = np.float16 if self._options.compute == "float16" else np.float32
        return self._graph.constant(name, np.array(value, dtype=dtype))

    def _vector(self, name: str) -> ir.Value:
        stored = self._weights[name]
        assert isinstance(stored, DenseMatrix), name
        return self._read.vector(f"{name}.weight", stored)

    def _embed(self, ids: ir.Value) -> ir.Value:
        tied = self._config.tied_embeddings
        hidden = self._read.gather_rows(ids, "head" if tied else "embed", "embed", self._weights["embed"])
        if self._config.embedding_scale != 1.0:
            scale = self._scalar("embed.scale", self._config.embedding_scale)
            hidden = self._graph.node("Mul", [hidden, scale], "embed_scaled")
        return hidden

    def _norm(self, branch: ir.Value | None, residual: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
        """Adds the branch to the residual stream and norms the sum: (normed, new residual)."""
        epsilon = self._config.norm_epsilon
        weight = self._vector(name)
        if branch is None:
            return self._rms(residual, weight, name), residual
        normed, mean, deviation, total = self._graph.nodes(
            "SkipSimplifiedLayerNormalization",
            [branch, residual, weight],
            name,
            outputs=4,
            domain=MICROSOFT,
            epsilon=epsilon,
        )
        mean.name = deviation.name = ""
        return normed, total

    def _rms(self, value: ir.Value, weight: ir.Value, name: str) -> ir.Value:
        return self._graph.node(
            "SimplifiedLayerNormalization",
            [value, weight],
            name,
            axis=-1,
            epsilon=self._config.norm_epsilon,
            stash_type=1,
        )

    def _post_norm(self, branch: ir.Value, name: str) -> ir.Value:
        return self._rms(branch, self._vector(name), name) if self._config.post_norms else branch

    def _attention(
        self,
        index: int,
        layer: LayerConfig,
        normed: ir.Value,
        seqlens: ir.Value,
        total: ir.Value,
        window: ir.Value | None,
    ) -> tuple[ir.Value, tuple[ir.Value, ir.Value]]:
        """The attention branch and the present key and value. `window` is added to the scores."""
        at = f"layers.{index}"
        graph, config = self._graph, self._config
        qkv = self._read.linear(normed, f"{at}.qkv", self._weights[f"{at}.qkv"])
        if config.qkv_bias:
            qkv = graph.node("Add", [qkv, self._vector(f"{at}.qkv_bias")], f"{at}.qkv_add")
        query, key, value = (qkv, None, None)
        if config.qk_norm:
            query, key, value = self._split_and_norm(at, layer, qkv)
        past = [
            graph.input(f"past_key_values.{index}.{kind}", self._float, self._kv_shape(layer))
            for kind in ("key", "value")
        ]
        cos, sin = (self._rope(layer, part) for part in (0, 1))
        scale = config.attention_scale or layer.head_dim**-0.5
        attended, present_key, present_value = graph.nodes(
            "GroupQueryAttention",
            [query, key, value, *past, seqlens, total, cos, sin, *([] if window is None else [None, window])],
            f"{at}.attention",
            outputs=3,
            domain=MICROSOFT,
            num_heads=layer.num_heads,
            kv_num_heads=layer.num_kv_heads,
            scale=float(scale),
            do_rotary=1,
            rotary_interleaved=0,
        )
        branch = self._read.linear(attended, f"{at}.o", self._weights[f"{at}.o"])
        return self._post_norm(branch, f"{at}.attn_post_norm"), (present_key, present_value)

    def _window(
        self, layer: LayerConfig, ids: ir.Value, seqlens: ir.Value, total: ir.Value
    ) -> ir.Value | None:
        """A layer's window as a bias [batch, 1, tokens, total] of the scores; None where it never bites.

        Not GroupQueryAttention's `local_window_size`: up to onnxruntime 1.23 that excludes the token itself,
        from 1.24 on it includes it (onnxruntime#25927), and one bundle must suit both.
        """
        size = layer.sliding_window_tokens
        if size is None or size >= self._options.context_tokens:
            return None
        if size not in self._windows:
            self._windows[size] = self._window_bias(f"window_{size}", size, ids, seqlens, total)
        return self._windows[size]

    def _window_bias(self, at: str, size: int, ids: ir.Value, seqlens: ir.Value, total: ir.Value) -> ir.Value:
        graph = self._graph

        def number(name: str, *values: int) -> ir.Value:
            return graph.constant(name, np.array(values if len(values) > 1 else values[0], dtype=np.int64))

        def long(value: ir.Value, name: str) -> ir.Value:
            return graph.node("Cast", [value], f"{at}_{name}", to=int(ir.DataType.INT64))

        zero, one = number("zero", 0), number("one", 1)
        shape = graph.node("Shape", [ids], f"{at}_shape")
        count = graph.node("Gather", [shape, one], f"{at}_tokens", axis=0)
        # The first of these tokens has the position seqlens_k + 1 - tokens; what it sees no more ends `size`
        # positions before it.
        last_hidden = graph.node("Sub", [number(f"{at}_reach", 1 - size), count], f"{at}_reach_of_first")
        first = graph.node("Add", [long(seqlens, "seqlens"), last_hidden], f"{at}_first_hidden")
        first = graph.node("Unsqueeze", [first, number("axes_123", 1, 2, 3)], f"{at}_first_column")
        steps = graph.node("Range", [zero, count, one], f"{at}_steps")
        steps = graph.node("Unsqueeze", [steps, number("axes_013", 0, 1, 3)], f"{at}_steps_column")
        hidden_up_to = graph.node("Add", [first, steps], f"{at}_hidden_up_to")
        keys = graph.node("Range", [zero, long(total, "total"), one], f"{at}_keys")
        hidden = graph.node("LessOrEqual", [keys, hidden_up_to], f"{at}_hidden")
        return graph.node(
            "Where", [hidden, self._scalar("hidden_bias", _HIDDEN_BIAS), self._scalar("no_bias", 0.0)], at
        )

    def _split_and_norm(
        self, at: str, layer: LayerConfig, qkv: ir.Value
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Packed qkv → q and k normed per head, and v; each [batch, tokens, heads·head_dim]."""
        graph, dim = self._graph, layer.head_dim
        sizes = np.array([layer.num_heads * dim] + 2 * [layer.num_kv_heads * dim], dtype=np.int64)
        query, key, value = graph.nodes(
            "Split", [qkv, graph.constant(f"{at}.qkv_sizes", sizes)], f"{at}.qkv_split", outputs=3, axis=-1
        )
        parts = []
        for name, part, heads in (("q", query, layer.num_heads), ("k", key, layer.num_kv_heads)):
            per_head = graph.constant(f"per_head_{heads}x{dim}", np.array([0, 0, heads, dim], dtype=np.int64))
            flat = graph.constant(f"flat_{heads * dim}", np.array([0, 0, heads * dim], dtype=np.int64))
            part = graph.node("Reshape", [part, per_head], f"{at}.{name}_heads")
            part = self._rms(part, self._vector(f"{at}.{name}_norm"), f"{at}.{name}_norm")
            parts.append(graph.node("Reshape", [part, flat], f"{at}.{name}_flat"))
        return parts[0], parts[1], value

    def _rope(self, layer: LayerConfig, part: int) -> ir.Value:
        number = list(self._ropes).index(layer.rope)
        stored = self._ropes[layer.rope][part]
        return self._read.vector(f"rope_{number}_{('cos', 'sin')[part]}", stored)

    def _mlp(self, index: int, normed: ir.Value) -> ir.Value:
        at = f"layers.{index}"
        graph = self._graph
        gate = self._read.linear(normed, f"{at}.gate", self._weights[f"{at}.gate"])
        up = self._read.linear(normed, f"{at}.up", self._weights[f"{at}.up"])
        if self._config.activation == "silu":
            active = graph.node("QuickGelu", [gate], f"{at}.act", domain=MICROSOFT, alpha=1.0)
        else:
            active = graph.node("Gelu", [gate], f"{at}.act", approximate="tanh")
        product = graph.node("Mul", [active, up], f"{at}.gated")
        branch = self._read.linear(product, f"{at}.down", self._weights[f"{at}.down"])
        return self._post_norm(branch, f"{at}.mlp_post_norm")

    def _last_positions(self, value: ir.Value, count: ir.Value, name: str) -> ir.Value:
        """The last `count` positions of [batch, tokens, width]."""
        graph = self._graph
        start = graph.node("Neg", [count], f"{name}_from")
        end = graph.constant("kept_to", np.array([_LAST], dtype=np.int64))
        axis = graph.constant("kept_axis", np.array([1], dtype=np.int64))
        return graph.node("Slice", [value, start, end, axis], name)

    def _hidden_outputs(self, normed: ir.Value) -> None:
        """The final norm's output at the last position, and its sum over the positions kept.

        They cost a decode step two copies of one row: nothing has to be computed for them alone.
        """
        graph = self._graph
        shape: list[int | str] = ["batch", self._config.hidden_size]
        if self._options.compute != "float32":
            normed = graph.node("Cast", [normed], "states_float32", to=int(ir.DataType.FLOAT))
        axis = graph.constant("kept_axis", np.array([1], dtype=np.int64))
        last = graph.constant("last_position", np.array(-1, dtype=np.int64))
        at_last = graph.node("Gather", [normed, last], "last_state", axis=1)
        total = graph.node("ReduceSum", [normed, axis], "summed_states", keepdims=0)
        graph.output(at_last, "hidden_last", ir.DataType.FLOAT, shape)
        graph.output(total, "hidden_sum", ir.DataType.FLOAT, shape)

    def _head(self, normed: ir.Value) -> ir.Value:
        graph, config = self._graph, self._config
        stored = self._weights["embed" if config.tied_embeddings else "head"]
        logits = self._read.linear(normed, "head", stored)
        if self._options.compute != "float32":
            logits = graph.node("Cast", [logits], "logits_float32", to=int(ir.DataType.FLOAT))
        if config.logit_softcap is not None:
            cap = graph.constant("logit_cap", np.array(config.logit_softcap, dtype=np.float32))
            logits = graph.node("Div", [logits, cap], "logits_over_cap")
            logits = graph.node("Tanh", [logits], "logits_tanh")
            logits = graph.node("Mul", [logits, cap], "logits_capped")
        return logits
