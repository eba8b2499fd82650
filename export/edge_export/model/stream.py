"""Evaluating a decoder with one layer's weights in memory at a time.

Peak memory is one layer's float32 weights, plus the residual stream of all sequences, plus one layer's
activations of one sequence; the vocabulary's matrices are read in row chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from edge_export.model.config import DecoderConfig, LayerConfig, TensorSource
from edge_export.model.layer import LayerTrace, layer_forward, rms_norm, soft_cap
from edge_export.model.tensors import layer_shapes

DEFAULT_CHUNK_ROWS = 16_384

Weights = Mapping[str, torch.Tensor]
#: (first row, row after the last) → those rows of the matrix that makes logits, float32
HeadRows = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True)
class LayerVisit:
    """A layer about to run: its weights by layer-local name (float32) and the residual stream entering it."""

    index: int
    layer: LayerConfig
    weights: Weights
    #: one [T, hidden] per sequence; read-only
    inputs: Sequence[torch.Tensor]


#: Called before a layer runs. May return other weights to run it with (quantized ones, say), or None.
OnLayer = Callable[[LayerVisit], "Weights | None"]
#: Called with (layer index, sequence index, trace) after each sequence has passed the layer.
OnTrace = Callable[[int, int, LayerTrace], None]


def layer_weights(config: DecoderConfig, source: TensorSource, index: int) -> dict[str, torch.Tensor]:
    """One layer's weights by layer-local name, float32."""
    return {name: source.get(f"layers.{index}.{name}") for name in layer_shapes(config, config.layers[index])}


def embed_tokens(
    config: DecoderConfig, source: TensorSource, token_ids: torch.Tensor, chunk_rows: int = DEFAULT_CHUNK_ROWS
) -> torch.Tensor:
    """The residual stream entering layer 0, [T, hidden], of `token_ids` int64 [T]; reads row chunks."""
    result = torch.empty(len(token_ids), config.hidden_size)
    for start in range(0, config.vocab_size, chunk_rows):
        stop = min(start + chunk_rows, config.vocab_size)
        inside = (token_ids >= start) & (token_ids < stop)
        if inside.any():
            result[inside] = source.rows("embed.weight", start, stop)[token_ids[inside] - start]
    return result * config.embedding_scale


def stream_hidden(
    config: DecoderConfig,
    source: TensorSource,
    token_batches: Sequence[torch.Tensor],
    on_layer: OnLayer | None = None,
    on_trace: OnTrace | None = None,
) -> list[torch.Tensor]:
    """The head's inputs (after the final norm), one [T, hidden] per sequence of token ids int64 [T].

    Layers are loaded one after another; every sequence passes a layer before the next is loaded. Raises
    CheckpointError if a tensor is missing or corrupt.
    """
    if not token_batches:
        return []
    with torch.no_grad():
        lengths = [len(tokens) for tokens in token_batches]
        hidden = list(torch.split(embed_tokens(config, source, torch.cat(list(token_batches))), lengths))
        for index, layer in enumerate(config.layers):
            weights: Weights = layer_weights(config, source, index)
            if on_layer is not None:
                weights = on_layer(LayerVisit(index, layer, weights, tuple(hidden))) or weights
            for number, states in enumerate(hidden):
                trace = layer_forward(layer, config, weights, states)
                if on_trace is not None:
                    on_trace(index, number, trace)
                hidden[number] = trace.hidden_out
        norm = source.get("norm.weight")
        return [rms_norm(states, norm, config.norm_epsilon) for states in hidden]


def head_name(config: DecoderConfig) -> str:
    """The canonical name of the matrix that makes logits."""
    return "embed.weight" if config.tied_embeddings else "head.weight"


def original_head(config: DecoderConfig, source: TensorSource) -> HeadRows:
    """Rows of the checkpoint's own head."""
    name = head_name(config)
    return lambda start, stop: source.rows(name, start, stop)


def head_chunks(
    config: DecoderConfig, head: HeadRows, hidden: torch.Tensor, chunk_rows: int = DEFAULT_CHUNK_ROWS
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first token id, logits [N, chunk]) over the vocabulary, for normed states `hidden` [N, hidden]."""
    with torch.no_grad():
        for start in range(0, config.vocab_size, chunk_rows):
            rows = head(start, min(start + chunk_rows, config.vocab_size))
            yield start, soft_cap(config, F.linear(hidden, rows))
