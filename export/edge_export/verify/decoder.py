"""Checks a decoder's graphs on the device backend against torch, and measures what quantization cost.

Expected values come from torch on the weights as stored: they test the graph and its kernels. Quality
compares the graph with torch on the original weights: it tests the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edge_export.model.config import DecoderConfig
from edge_export.model.stream import HeadRows, head_chunks
from edge_export.progress import Progress
from edge_export.storage.decoder import StoredDecoder
from edge_export.storage.matrices import stored_rows
from edge_reasoner.backends.base import DecoderModel, KVCache
from edge_reasoner.contract.bundle.manifest import DecoderGolden, GoldenCheck, GoldenSet

#: Of each golden position: the logits of so many best tokens, and of so many others spread over the rest.
_BEST_TOKENS, _OTHER_TOKENS = 32, 96
_DECODED_TOKENS = 6
_SHORT_TOKENS, _MEDIUM_TOKENS, _LONG_TOKENS = 7, 40, 160
_PAST_WINDOW_TOKENS = 24
#: Longest golden vector: a window beyond this is not crossed at activation.
_MAX_GOLDEN_TOKENS = 1100
_SCORED_TOKENS = 64
#: exp of more overflows; a model so sure of what is wrong is broken anyway.
_MAX_NATS = 700.0


@dataclass(frozen=True)
class Quality:
    """A graph beside the original model on held-out text."""

    positions: int
    top1_agreement: float
    top1_agreement_stderr: float
    perplexity: float
    original_perplexity: float

    def to_dict(self) -> dict[str, float]:
        """As the manifest and `--json` have it."""
        return {
            "positions": float(self.positions),
            "top1_agreement": self.top1_agreement,
            "top1_agreement_stderr": self.top1_agreement_stderr,
            "perplexity": self.perplexity,
            "original_perplexity": self.original_perplexity,
            "perplexity_ratio": self.perplexity / self.original_perplexity,
        }


def golden_sequences(
    config: DecoderConfig, texts: Sequence[torch.Tensor], context_tokens: int
) -> list[torch.Tensor]:
    """Token ids of the golden vectors: a short one, a medium and a long one, and one beyond the window.

    Short ones first; all fit the context. Taken from the start of `texts`, joined where one is too short.
    """
    joined = torch.cat(list(texts))
    wanted = [_SHORT_TOKENS, _MEDIUM_TOKENS, _LONG_TOKENS]
    windows = {w for w in (layer.sliding_window_tokens for layer in config.layers) if w is not None}
    past = [w + _PAST_WINDOW_TOKENS for w in windows if w + _PAST_WINDOW_TOKENS <= _MAX_GOLDEN_TOKENS]
    lengths = sorted({min(n, context_tokens) for n in wanted + past})
    while len(joined) < lengths[-1]:
        joined = torch.cat([joined, joined])
    return [joined[:length] for length in lengths]


def decoder_golden(
    config: DecoderConfig,
    sequences: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    head: HeadRows,
    tolerance: float,
) -> GoldenSet:
    """Golden vectors of `sequences` with expected logits from `states` [T, hidden]."""
    vectors = []
    for tokens, hidden in zip(sequences, states, strict=True):
        prefill = max(1, len(tokens) - _DECODED_TOKENS)
        positions = list(range(prefill - 1, len(tokens)))
        logits = torch.cat([part for _, part in head_chunks(config, head, hidden[positions])], dim=-1)
        checks = tuple(_check(position, row) for position, row in zip(positions, logits, strict=True))
        ids = tuple(int(token) for token in tokens)
        vectors.append(DecoderGolden(token_ids=ids, prefill_tokens=prefill, checks=checks))
    return GoldenSet(schema_version=1, tolerance=tolerance, decoder=tuple(vectors))


def _check(position: int, logits: torch.Tensor) -> GoldenCheck:
    best = logits.topk(min(_BEST_TOKENS, len(logits))).indices.tolist()
    step = max(1, len(logits) // _OTHER_TOKENS)
    others = [token for token in range(0, len(logits), step) if token not in set(best)]
    chosen = [*best, *others]
    values = tuple(float(f"{value:.6g}") for value in logits[chosen].tolist())
    return GoldenCheck(position=position, argmax=best[0], token_ids=tuple(chosen), logits=values)


def stored_head(config: DecoderConfig, data_path: Path, stored: StoredDecoder) -> HeadRows:
    """Rows of the head as stored."""
    matrix = stored.weights["embed" if config.tied_embeddings else "head"]
    return lambda start, stop: stored_rows(data_path, matrix, start, stop)


def measure_quality(
    config: DecoderConfig,
    model: DecoderModel,
    texts: Sequence[torch.Tensor],
    original_states: Sequence[torch.Tensor],
    head: HeadRows,
    progress: Progress,
) -> Quality:
    """The graph's choices and perplexity on `texts` beside the original model's (`original_states`, `head`).

    Agreement counts all positions; perplexity all but each text's last.
    """
    targets = [torch.cat([tokens[1:], tokens[:1]]) for tokens in texts]
    choices, log_probs = _original_figures(config, torch.cat(list(original_states)), head, torch.cat(targets))
    agree: list[NDArray[np.bool_]] = []
    graph_log_probs: list[NDArray[np.float64]] = []
    original_log_probs: list[NDArray[np.float64]] = []
    offset = 0
    cache = model.new_cache(max(map(len, texts)))
    for number, tokens in enumerate(texts):
        progress("measuring quality", number, len(texts))
        ids = tokens.numpy()
        got = [_row_figures(logits, ids[1:], start) for start, logits in _scored(model, cache, ids)]
        mine = slice(offset, offset + len(ids))
        agree.append(np.concatenate([choice for choice, _ in got]) == choices[mine])
        graph_log_probs.append(np.concatenate([log_prob for _, log_prob in got]))
        original_log_probs.append(log_probs[mine][:-1])
        offset += len(ids)
    cache.close()
    hits = np.concatenate(agree)
    share = float(hits.mean())
    return Quality(
        positions=len(hits),
        top1_agreement=share,
        top1_agreement_stderr=math.sqrt(share * (1 - share) / len(hits)),
        perplexity=_perplexity(np.concatenate(graph_log_probs)),
        original_perplexity=_perplexity(np.concatenate(original_log_probs)),
    )


def _perplexity(log_probs: NDArray[np.float64]) -> float:
    """exp of the mean negative log probability, held at what a double can hold."""
    return math.exp(min(-float(log_probs.mean()), _MAX_NATS))


def _scored(
    model: DecoderModel, cache: KVCache, ids: NDArray[np.int64]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(first position, logits) of a text, a few positions at a time."""
    cache.rewind(0)
    for start in range(0, len(ids), _SCORED_TOKENS):
        chunk = ids[start : start + _SCORED_TOKENS]
        yield start, model.extend(cache, chunk, len(chunk)).logits


def _row_figures(
    logits: NDArray[np.float32], following: NDArray[np.int64], start: int
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Each row's argmax, and the log probability of the token that follows it (none after the last)."""
    targets = following[start : start + len(logits)]
    top = logits.max(-1, keepdims=True)
    log_sum = top[:, 0] + np.log(np.exp(logits - top).sum(-1, dtype=np.float64))
    chosen = logits[np.arange(len(targets)), targets]
    return logits.argmax(-1), chosen.astype(np.float64) - log_sum[: len(targets)]


def _original_figures(
    config: DecoderConfig, states: torch.Tensor, head: HeadRows, targets: torch.Tensor
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Argmax and log probability of the target for every state [N, hidden], reading the head in slices."""
    best = torch.full((len(states),), -torch.inf)
    choice = torch.zeros(len(states), dtype=torch.int64)
    log_sum, target_logits = best.clone(), torch.zeros(len(states))
    for start, logits in head_chunks(config, head, states):
        log_sum = torch.logaddexp(log_sum, logits.logsumexp(-1))
        top, index = logits.max(-1)
        choice = torch.where(top > best, index + start, choice)
        best = torch.maximum(best, top)
        inside = (targets >= start) & (targets < start + logits.shape[1])
        target_logits[inside] = logits[inside, targets[inside] - start]
    return choice.numpy(), (target_logits - log_sum).to(torch.float64).numpy()
