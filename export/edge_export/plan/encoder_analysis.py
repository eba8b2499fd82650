"""What calibration sentences say about an encoder: how much each matrix's rounding turns the embeddings.

Loss is 1 − cosine to the float32 embedding, on average over the sentences: measured, with one matrix rounded
to 4 bits at a time, and once with all of them at 8. Only the layers from the rounded one on are run again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from edge_export.model.config import EncoderConfig, TensorSource
from edge_export.model.encoder import Encoder, padded_batches
from edge_export.plan.encoder import EncoderAnalysis, encoder_weights, matrix_kind, quantizer_of
from edge_export.plan.recipes import encoder_int4, smallest_int8
from edge_export.progress import Progress
from edge_export.quantize import make_quantizer
from edge_export.quantize.formats import BlockFormat

#: Multiply-accumulates that an analysis may take: a larger encoder sees fewer tokens.
_WORK: Final = 4e11
_MAX_TOKENS, _MIN_TOKENS = 1536, 96


def analysis_tokens(config: EncoderConfig) -> int:
    """How many calibration tokens an analysis reads."""
    layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.ffn_width
    # Four matrices a layer, and on average half of the layers run again for each.
    per_token = 2 * layer * config.num_layers**2
    return max(_MIN_TOKENS, min(_MAX_TOKENS, int(_WORK / per_token)))


@dataclass(frozen=True)
class _Batch:
    mask: torch.Tensor
    ids: torch.Tensor
    #: the inputs of every layer, float32 [B, T, hidden]
    inputs: tuple[torch.Tensor, ...]
    #: float32 [B, hidden]
    embeddings: torch.Tensor


def analyse_encoder(
    config: EncoderConfig, source: TensorSource, token_ids: Sequence[Sequence[int]], progress: Progress
) -> EncoderAnalysis:
    """Measures on sentences of token ids (special tokens included). Holds the encoder in memory once."""
    encoder = Encoder.from_source(config, source)
    names = [(name, tensors) for name, tensors in encoder_weights(config) if matrix_kind(name) is not None]
    used = torch.unique(torch.tensor([token for ids in token_ids for token in ids], dtype=torch.int64))
    losses: dict[str, float] = {}
    with torch.inference_mode():
        batches = [_run(encoder, ids, mask) for _, ids, mask in padded_batches(token_ids)]
        for index, (name, tensors) in enumerate(names):
            progress("measuring the encoder's sensitivity", index, len(names))
            with _rounded(encoder, tensors, encoder_int4(), used):
                losses[name.removesuffix(".weight")] = _loss(encoder, batches, _first_layer(name))
        for _, tensors in names:
            columns = encoder.get_parameter(tensors[0]).shape[1]
            for tensor, weight in _quantized(encoder, tensors, smallest_int8(columns), used).items():
                encoder.get_parameter(tensor).data = weight
        int8_loss = _loss(encoder, batches, None)
    return EncoderAnalysis(len(token_ids), int8_loss, losses)


def _first_layer(name: str) -> int | None:
    """The layer of `layers.3.qkv.weight`; None before the first."""
    return int(name.split(".")[1]) if name.startswith("layers.") else None


def _run(encoder: Encoder, ids: torch.Tensor, mask: torch.Tensor) -> _Batch:
    inputs = []
    hidden: torch.Tensor = encoder.embed(ids)
    for layer in encoder.layers:
        inputs.append(hidden)
        hidden = layer(hidden, _attended(mask))
    return _Batch(mask, ids, tuple(inputs), encoder.pooled(hidden, mask))


def _attended(mask: torch.Tensor) -> torch.Tensor:
    return mask.to(torch.bool)[:, None, None, :]


def _loss(encoder: Encoder, batches: Sequence[_Batch], first: int | None) -> float:
    """Mean of 1 − cosine; layers before `first` (None: and the embedding) are as they were."""
    total, count = 0.0, 0
    for batch in batches:
        hidden = encoder.embed(batch.ids) if first is None else batch.inputs[first]
        for layer in list(encoder.layers)[first or 0 :]:
            hidden = layer(hidden, _attended(batch.mask))
        got = encoder.pooled(hidden, batch.mask).double()
        total += float((1 - (got * batch.embeddings.double()).sum(-1)).sum())
        count += len(got)
    return total / count


def _quantized(
    encoder: Encoder, tensors: Sequence[str], fmt: BlockFormat, used: torch.Tensor
) -> Mapping[str, torch.Tensor]:
    """The tensors as stored. Of the words only the rows in `used`: no other is read."""
    quantizer = make_quantizer(quantizer_of(fmt))
    rounded = {}
    for tensor in tensors:
        weight = encoder.get_parameter(tensor).data
        if tensor == "embed.word.weight":
            changed = weight.clone()
            changed[used] = quantizer.quantize(weight[used], fmt).dequantize()
        else:
            changed = quantizer.quantize(weight, fmt).dequantize()
        rounded[tensor] = changed
    return rounded


@contextmanager
def _rounded(
    encoder: Encoder, tensors: Sequence[str], fmt: BlockFormat, used: torch.Tensor
) -> Iterator[None]:
    """The encoder with these tensors rounded, and as it was afterwards."""
    before = {tensor: encoder.get_parameter(tensor).data for tensor in tensors}
    try:
        for tensor, weight in _quantized(encoder, tensors, fmt, used).items():
            encoder.get_parameter(tensor).data = weight
        yield
    finally:
        for tensor, weight in before.items():
            encoder.get_parameter(tensor).data = weight
