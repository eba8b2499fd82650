"""What calibration text says about a decoder: which inputs matter, and what 4 bits would cost each unit.

Importance is the mean square of each input of a matrix, after AWQ (arXiv 2306.00978) and llama.cpp's
importance matrix: the quantizer weighs a column's error with it.

Loss is a second-order estimate of the divergence (nats per token) between the model and the model with that
one unit at 4 bits. At the reference the gradient of the divergence is zero and its Hessian is the Fisher
matrix, so KL ≈ ½ E[(g·δ)²]: g is the gradient of −log p(y) for labels y that the model itself draws, δ the
change of the layer's output (Optimal Brain Damage's saliency with an empirical Fisher matrix, as in
arXiv 2306.07629). Losses of several units are taken to add up.

One layer's weights are in memory at a time: forward once, then backward layer by layer, recomputing each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from edge_export.model.config import DecoderConfig, TensorSource
from edge_export.model.layer import LayerTrace, layer_forward, rms_norm, soft_cap
from edge_export.model.stream import (
    DEFAULT_CHUNK_ROWS,
    LayerVisit,
    head_chunks,
    layer_weights,
    original_head,
    stream_hidden,
)
from edge_export.plan.units import LAYER_UNITS
from edge_export.progress import Progress
from edge_export.quantize.base import InputStatistics, Quantizer
from edge_export.quantize.formats import BlockFormat
from edge_export.quantize.statistics import second_moments

#: unit name → mean square of each of its inputs, float32 [columns]
Importance = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Analysis:
    """Importance of inputs, and loss in nats per token of each unit at 4 bits (empty if not asked for)."""

    tokens: int
    importance: Importance
    #: the head's inputs, with their correlations
    head_inputs: InputStatistics
    int4_losses: Mapping[str, float] = field(default_factory=dict)


def analyse_importance(
    config: DecoderConfig, source: TensorSource, batches: Sequence[torch.Tensor], progress: Progress
) -> Analysis:
    """One forward pass over token ids int64 [T] each."""
    run = _Forward(config, source, batches, progress, keep_inputs=False)
    return Analysis(sum(map(len, batches)), run.importance, second_moments(run.normed))


def analyse_losses(
    config: DecoderConfig,
    source: TensorSource,
    batches: Sequence[torch.Tensor],
    quantizer: Quantizer,
    fmt: BlockFormat,
    seed: int,
    progress: Progress,
) -> Analysis:
    """One forward and one backward pass, and one more forward of each layer for each of its units."""
    run = _Forward(config, source, batches, progress, keep_inputs=True)
    tokens = sum(map(len, batches))
    losses, gradients = _head_losses(config, source, run, quantizer, fmt, seed)
    for index in reversed(range(len(config.layers))):
        progress("measuring the layers' sensitivity", len(config.layers) - index, len(config.layers))
        weights = layer_weights(config, source, index)
        layer_losses, gradients = _layer_losses(
            config, index, weights, run.inputs[index], gradients, run.importance, quantizer, fmt
        )
        losses |= {f"layers.{index}.{kind}": value for kind, value in layer_losses.items()}
    return Analysis(
        tokens,
        run.importance,
        second_moments(run.normed),
        {name: value / tokens for name, value in losses.items()},
    )


class _Forward:
    """A forward pass that keeps the sums of squares and, if asked, every layer's inputs."""

    def __init__(
        self,
        config: DecoderConfig,
        source: TensorSource,
        batches: Sequence[torch.Tensor],
        progress: Progress,
        keep_inputs: bool,
    ) -> None:
        self.inputs: list[Sequence[torch.Tensor]] = []
        self._squares: dict[str, torch.Tensor] = {}
        self._config, self._progress, self._keep_inputs = config, progress, keep_inputs
        self.normed = stream_hidden(config, source, batches, self._on_layer, self._on_trace)
        self.last_hidden = self._last
        for states in self.normed:
            self._add("head", states)
        tokens = sum(map(len, batches))
        self.importance = {name: total / tokens for name, total in self._squares.items()}

    def _on_layer(self, visit: LayerVisit) -> None:
        self._progress("reading calibration text", visit.index, len(self._config.layers))
        if self._keep_inputs:
            self.inputs.append(visit.inputs)
        self._last: list[torch.Tensor] = []

    def _on_trace(self, index: int, _: int, trace: LayerTrace) -> None:
        at = f"layers.{index}"
        self._add(f"{at}.qkv", trace.attn_in)
        self._add(f"{at}.o", trace.o_in)
        self._add(f"{at}.gate_up", trace.mlp_in)
        self._add(f"{at}.down", trace.down_in)
        self._last.append(trace.hidden_out)

    def _add(self, name: str, states: torch.Tensor) -> None:
        squares = states.square().sum(0)
        self._squares[name] = self._squares[name] + squares if name in self._squares else squares


def _head_losses(
    config: DecoderConfig,
    source: TensorSource,
    run: _Forward,
    quantizer: Quantizer,
    fmt: BlockFormat,
    seed: int,
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """The head's loss summed over tokens; the gradient of −log p(y) at each last hidden state [T, hidden].

    Reads the head three times in row chunks: normalizer and labels, then probabilities, which give the
    gradient and the variance of the logits' change: KL ≈ ½ Var_p(δ logits).
    """
    hidden = torch.cat(run.normed)
    head, importance = original_head(config, source), run.importance["head"]
    generator = torch.Generator().manual_seed(seed)
    tokens = hidden.shape[0]
    log_sum = torch.full((tokens,), -torch.inf)
    best, labels = torch.full((tokens,), -torch.inf), torch.zeros(tokens, dtype=torch.int64)
    with torch.no_grad():
        for start, logits in head_chunks(config, head, hidden):
            log_sum = torch.logaddexp(log_sum, logits.logsumexp(-1))
            # The largest of logits + Gumbel noise is a draw from softmax(logits).
            noisy = logits - torch.empty_like(logits).exponential_(generator=generator).log_()
            top, index = noisy.max(-1)
            labels = torch.where(top > best, index + start, labels)
            best = torch.maximum(best, top)
        gradient = torch.zeros_like(hidden)
        mean, square = torch.zeros(tokens), torch.zeros(tokens)
        for start in range(0, config.vocab_size, DEFAULT_CHUNK_ROWS):
            rows = head(start, min(start + DEFAULT_CHUNK_ROWS, config.vocab_size))
            stop = start + rows.shape[0]
            raw = F.linear(hidden, rows)
            logits = soft_cap(config, raw)
            shares = (logits - log_sum[:, None]).exp_()
            slope = 1.0 if config.logit_softcap is None else 1 - (logits / config.logit_softcap).square()
            rounded = quantizer.quantize(rows, fmt, InputStatistics(importance)).dequantize()
            delta = F.linear(hidden, rounded - rows) * slope
            mean += (shares * delta).sum(-1)
            square += (shares * delta.square()).sum(-1)
            mine = (labels >= start) & (labels < stop)
            shares[mine, labels[mine] - start] -= 1
            gradient += (shares * slope) @ rows
        norm = source.get("norm.weight")
    losses = {"head": 0.5 * float((square - mean.square()).sum())}
    gradients = []
    for last, part in zip(run.last_hidden, torch.split(gradient, [len(s) for s in run.normed]), strict=True):
        leaf = last.detach().requires_grad_(True)
        (back,) = torch.autograd.grad(rms_norm(leaf, norm, config.norm_epsilon), leaf, part)
        gradients.append(back)
    return losses, gradients


def _layer_losses(
    config: DecoderConfig,
    index: int,
    weights: Mapping[str, torch.Tensor],
    inputs: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    importance: Importance,
    quantizer: Quantizer,
    fmt: BlockFormat,
) -> tuple[dict[str, float], list[torch.Tensor]]:
    """Each unit's loss summed over tokens, and the gradients at the layer's inputs."""
    layer = config.layers[index]
    changed: dict[str, dict[str, torch.Tensor]] = {}
    for kind, parts in LAYER_UNITS:
        inputs_of = InputStatistics(importance[f"layers.{index}.{kind}"])
        changed[kind] = {
            f"{part}.weight": quantizer.quantize(weights[f"{part}.weight"], fmt, inputs_of).dequantize()
            for part in parts
        }
    losses = dict.fromkeys(changed, 0.0)
    back: list[torch.Tensor] = []
    for states, gradient in zip(inputs, gradients, strict=True):
        leaf = states.detach().requires_grad_(True)
        exact = layer_forward(layer, config, weights, leaf).hidden_out
        back.append(torch.autograd.grad(exact, leaf, gradient)[0])
        with torch.no_grad():
            for kind, replaced in changed.items():
                delta = layer_forward(layer, config, {**weights, **replaced}, states).hidden_out - exact
                losses[kind] += 0.5 * float((delta * gradient).sum(-1).square().sum())
    return losses, back
