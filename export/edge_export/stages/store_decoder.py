"""Quantizes and stores a decoder, one layer in memory at a time, as its plan says.

Three streams of hidden states pass through the layers together: *calibration* text through the layers as
stored so far (what GPTQ corrects for), *check* text through the stored weights (what the graph must compute),
and the same check text through the original weights (what quality is measured against).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from edge_export.lower.decoder_onnx import store_rope_tables
from edge_export.model.config import DecoderConfig, TensorSource
from edge_export.model.layer import LayerTrace, layer_forward, rms_norm
from edge_export.model.stream import DEFAULT_CHUNK_ROWS, embed_tokens, head_name, layer_weights
from edge_export.plan.plan import ExportPlan
from edge_export.plan.recipes import UnitPlan
from edge_export.plan.units import LAYER_UNITS
from edge_export.progress import Progress
from edge_export.quantize import make_quantizer
from edge_export.quantize.base import InputStatistics
from edge_export.quantize.statistics import second_moments
from edge_export.storage.decoder import StoredDecoder
from edge_export.storage.external_data import ExternalData
from edge_export.storage.matrices import (
    KeptMatrices,
    StoredMatrix,
    store_blocks,
    store_blocks_in_parts,
    store_dense,
    store_dense_in_parts,
    stored_rows,
    to_float16,
)
from edge_export.storage.stage_cache import Notes

#: A layer's matrices in the graph: name, the unit that decides their format, the weights joined in them.
_GRAPH_MATRICES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("qkv", "qkv", ("q", "k", "v")),
    ("o", "o", ("o",)),
    ("gate", "gate_up", ("gate",)),
    ("up", "gate_up", ("up",)),
    ("down", "down", ("down",)),
)

Batches = Sequence[torch.Tensor]


@dataclass(frozen=True)
class _HalfStored:
    """The vocabulary and the first layers are stored; where the three streams are after them."""

    layers: int
    weights: KeptMatrices
    calibrated: tuple[torch.Tensor, ...]
    expected: tuple[torch.Tensor, ...]
    original: tuple[torch.Tensor, ...]


def store_decoder(
    path: Path,
    config: DecoderConfig,
    source: TensorSource,
    plan: ExportPlan,
    head_inputs: InputStatistics | None,
    calibration: Batches,
    checks: Batches,
    progress: Progress,
    notes: Notes,
) -> StoredDecoder:
    """Writes all weights and rotary tables to a new data file at `path`.

    `head_inputs` are the original model's, where the plan's quantizers want them; `calibration` may be empty
    where no unit is quantized with statistics. `notes` are resumed from, and made after every layer.
    """
    half = notes.resume(path, _HalfStored)
    with torch.no_grad(), ExternalData(path, resume=half is not None) as data:
        storing = _Storing(data, config, source, plan, head_inputs, progress)
        return storing.run(half or storing.start(calibration, checks), notes)


class _Storing:
    def __init__(
        self,
        data: ExternalData,
        config: DecoderConfig,
        source: TensorSource,
        plan: ExportPlan,
        head_inputs: InputStatistics | None,
        progress: Progress,
    ) -> None:
        self._data, self._config, self._source, self._plan = data, config, source, plan
        self._head_inputs, self._progress = head_inputs, progress
        self._weights: dict[str, StoredMatrix] = {}

    def start(self, calibration: Batches, checks: Batches) -> _HalfStored:
        """Stores the vocabulary, and embeds the texts."""
        config, source, tied = self._config, self._source, self._config.tied_embeddings
        self._progress("storing the vocabulary", 0, 1)
        unit = self._plan.for_unit("head" if tied else "embed")
        inputs = self._head_inputs if tied else None
        self._weights["embed"] = self._store_vocabulary("embed.weight", unit, inputs)
        return _HalfStored(
            0,
            KeptMatrices.of(self._weights),
            tuple(self._embed(tokens) for tokens in calibration),
            tuple(self._embed(tokens) for tokens in checks),
            tuple(embed_tokens(config, source, tokens) for tokens in checks),
        )

    def run(self, half: _HalfStored, notes: Notes) -> StoredDecoder:
        """Stores the layers that are left, and what comes after them."""
        config, source = self._config, self._source
        self._weights = half.weights.matrices()
        calibrated, expected, original = map(list, (half.calibrated, half.expected, half.original))
        for index in range(half.layers, len(config.layers)):
            self._progress("quantizing and storing layers", index, len(config.layers))
            layer, weights = config.layers[index], layer_weights(config, source, index)
            stored = self._store_layer(index, weights, calibrated)
            for streams, through in ((calibrated, stored), (expected, stored), (original, weights)):
                for number, states in enumerate(streams):
                    streams[number] = layer_forward(layer, config, through, states).hidden_out
            kept = KeptMatrices.of(self._weights)
            streams_now = tuple(calibrated), tuple(expected), tuple(original)
            notes.note(self._data.flushed_path(), _HalfStored(index + 1, kept, *streams_now))
        return self._finish(expected, original)

    def _finish(self, expected: Batches, original: Batches) -> StoredDecoder:
        config, norm = self._config, self._source.get("norm.weight")
        self._weights["norm"] = store_dense(self._data, norm, self._plan.dense)
        if not config.tied_embeddings:
            self._weights["head"] = self._store_vocabulary(
                head_name(config), self._plan.for_unit("head"), self._head_inputs
            )
        stored_norm = stored_rows(self._data.flushed_path(), self._weights["norm"], 0, config.hidden_size)
        return StoredDecoder(
            self._weights,
            store_rope_tables(self._data, config, self._plan.context_tokens, self._plan.dense),
            tuple(rms_norm(states, stored_norm, config.norm_epsilon) for states in expected),
            tuple(rms_norm(states, norm, config.norm_epsilon) for states in original),
        )

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of the stored embedding, scaled: [T, hidden]."""
        path, stored = self._data.flushed_path(), self._weights["embed"]
        unique, places = torch.unique(tokens, return_inverse=True)
        rows = torch.cat([stored_rows(path, stored, int(row), int(row) + 1) for row in unique])
        return rows[places] * self._config.embedding_scale

    def _store_vocabulary(self, name: str, plan: UnitPlan, inputs: InputStatistics | None) -> StoredMatrix:
        """The embedding or the head, in row slices: it may be the largest matrix by far."""
        rows, columns = self._source.shape(name)
        starts = range(0, rows, DEFAULT_CHUNK_ROWS)

        def part(start: int) -> torch.Tensor:
            self._progress("storing the vocabulary", start, rows)
            return self._source.rows(name, start, min(start + DEFAULT_CHUNK_ROWS, rows))

        if plan.format is None or plan.quantizer is None:
            return store_dense_in_parts(self._data, map(part, starts), self._plan.dense, rows, columns)
        quantizer, fmt = make_quantizer(plan.quantizer), plan.format
        parts = (quantizer.quantize(part(start), fmt, inputs) for start in starts)
        return store_blocks_in_parts(self._data, parts, fmt, rows, columns)

    def _store_layer(
        self, index: int, weights: Mapping[str, torch.Tensor], calibrated: Batches
    ) -> dict[str, torch.Tensor]:
        """Stores one layer; returns its weights as stored, float32, under their layer-local names."""
        at = f"layers.{index}"
        plans = {kind: self._plan.for_unit(f"{at}.{kind}") for kind, _ in LAYER_UNITS}
        statistics: dict[str, InputStatistics] = {}
        if any(plan.uses_statistics for plan in plans.values()):
            layer = self._config.layers[index]
            traces = [layer_forward(layer, self._config, weights, states) for states in calibrated]
            statistics = _layer_statistics(traces, plans)
        result: dict[str, torch.Tensor] = {}
        for name, kind, parts in _GRAPH_MATRICES:
            joined = torch.cat([weights[f"{part}.weight"] for part in parts])
            stored, back = self._store_matrix(joined, plans[kind], statistics.get(kind))
            self._weights[f"{at}.{name}"] = stored
            sizes = [len(weights[f"{part}.weight"]) for part in parts]
            for part, rows in zip(parts, torch.split(back, sizes), strict=True):
                result[f"{part}.weight"] = rows
        for name in weights:
            if name not in result:
                result[name] = self._rounded(weights[name])
        self._store_vectors(at, weights)
        return result

    def _store_matrix(
        self, weight: torch.Tensor, plan: UnitPlan, inputs: InputStatistics | None
    ) -> tuple[StoredMatrix, torch.Tensor]:
        """Stores a matrix as planned; also returns it as a graph will compute with it."""
        if plan.format is None or plan.quantizer is None:
            return store_dense(self._data, weight, self._plan.dense), self._rounded(weight)
        quantized = make_quantizer(plan.quantizer).quantize(weight, plan.format, inputs)
        return store_blocks(self._data, quantized), quantized.dequantize()

    def _store_vectors(self, at: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Norms and biases; the biases of q, k and v are one vector in the graph."""
        for name, weight in weights.items():
            part, kind = name.split(".")
            if weight.dim() == 1 and kind == "weight":
                self._weights[f"{at}.{part}"] = store_dense(self._data, weight, self._plan.dense)
        if self._config.qkv_bias:
            bias = torch.cat([weights[f"{part}.bias"] for part in ("q", "k", "v")])
            self._weights[f"{at}.qkv_bias"] = store_dense(self._data, bias, self._plan.dense)

    def _rounded(self, weight: torch.Tensor) -> torch.Tensor:
        """Float weights as stored."""
        return weight if self._plan.dense == "float32" else to_float16(weight).to(torch.float32)


def _layer_statistics(
    traces: Sequence[LayerTrace], plans: Mapping[str, UnitPlan]
) -> dict[str, InputStatistics]:
    """Statistics of every unit whose quantizer looks at them."""
    inputs: dict[str, Callable[[LayerTrace], torch.Tensor]] = {
        "qkv": lambda trace: trace.attn_in,
        "o": lambda trace: trace.o_in,
        "gate_up": lambda trace: trace.mlp_in,
        "down": lambda trace: trace.down_in,
    }
    return {
        kind: second_moments([inputs[kind](trace) for trace in traces])
        for kind, plan in plans.items()
        if plan.uses_statistics
    }
