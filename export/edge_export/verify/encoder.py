"""An encoder's golden vectors, from torch on the weights as stored, and its quality beside the original.

Both hold the whole encoder in memory once (encoders are small).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch

from edge_export.checkpoint.bert import EncoderCheckpoint
from edge_export.checkpoint.tokenizer_files import encode_texts
from edge_export.model.config import EncoderConfig
from edge_export.model.encoder import Encoder, encoder_tensor_shapes, padded_batches
from edge_export.plan.encoder import encoder_weights
from edge_export.storage.encoder import StoredEncoder
from edge_export.storage.matrices import stored_rows
from edge_reasoner.backends.base import EncoderModel
from edge_reasoner.contract.bundle.manifest import EncoderGolden, GoldenSet
from edge_reasoner.errors import InputError

_MAX_GOLDEN_TOKENS = 128
GOLDEN_TEXTS: Final = (
    "Where is the key?",
    "The train to the coast leaves at 9:40 from platform 12, not from platform 3 as announced.",
    "Ein größerer Speicher hilft nicht immer. 你好，世界！ It depends on what the program does with it, how "
    "often it reads the same bytes again, and whether the next request is already waiting in the queue.",
)


class StoredSource:
    """A `TensorSource` of an encoder's stored weights: exactly what a graph computes with."""

    def __init__(self, config: EncoderConfig, data_path: Path, stored: StoredEncoder) -> None:
        self._shapes, self._path, self._stored = encoder_tensor_shapes(config), data_path, stored
        #: canonical tensor -> the graph's weight that holds it, and its first row there
        self._places: dict[str, tuple[str, int]] = {}
        for name, parts in encoder_weights(config):
            row = 0
            for part in parts:
                self._places[part] = (name, row)
                row += self._shapes[part][0]

    def names(self) -> Iterator[str]:
        """See `TensorSource.names`."""
        return iter(self._shapes)

    def get(self, name: str) -> torch.Tensor:
        """See `TensorSource.get`."""
        return self.rows(name, 0, self._shapes[name][0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """See `TensorSource.rows`."""
        weight, first = self._places[name]
        return stored_rows(self._path, self._stored.weights[weight], first + start, first + stop)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource.shape`."""
        return self._shapes[name]


def encoder_golden(
    checkpoint: EncoderCheckpoint,
    data_path: Path,
    stored: StoredEncoder,
    tolerance: float,
    texts: Sequence[str] = GOLDEN_TEXTS,
) -> GoldenSet:
    """Embeddings of `texts` (cut to 128 tokens) by torch on the stored weights.

    `tolerance`: how far a kernel may be off, as 1 − cosine. Raises InputError without texts.
    """
    source = StoredSource(checkpoint.config, data_path, stored)
    token_ids = _tokenize(checkpoint, texts, _MAX_GOLDEN_TOKENS)
    expected = embed_with_torch(Encoder.from_source(checkpoint.config, source), token_ids)
    vectors = tuple(
        EncoderGolden(token_ids=tuple(ids), embedding=tuple(row.tolist()))
        for ids, row in zip(token_ids, expected, strict=True)
    )
    return GoldenSet(schema_version=1, tolerance=tolerance, encoder=vectors)


def encoder_quality(
    checkpoint: EncoderCheckpoint, model: EncoderModel, sentences: Sequence[str]
) -> dict[str, float]:
    """Cosines between a model's embeddings and the checkpoint's own in float32 torch, on `sentences`.

    Returns mean_cosine, mean_cosine_stderr (standard error of the mean; 0 for one sentence), min_cosine and
    sentences (their number). Raises InputError without sentences.
    """
    token_ids = _tokenize(checkpoint, sentences, checkpoint.config.context_tokens)
    expected = embed_with_torch(Encoder.from_source(checkpoint.config, checkpoint.source), token_ids)
    got = torch.from_numpy(model.embed(token_ids))
    cosines = torch.nn.functional.cosine_similarity(got.double(), expected.double(), dim=-1)
    count = len(cosines)
    spread = float(cosines.std()) if count > 1 else 0.0
    return {
        "mean_cosine": float(cosines.mean()),
        "mean_cosine_stderr": spread / math.sqrt(count),
        "min_cosine": float(cosines.min()),
        "sentences": float(count),
    }


def embed_with_torch(encoder: Encoder, token_ids: Sequence[Sequence[int]]) -> torch.Tensor:
    """float32 [n, hidden] for n token id lists, in their order; inputs of like length run together."""
    result = torch.empty(len(token_ids), encoder.config.hidden_size)
    with torch.inference_mode():
        for group, ids, mask in padded_batches(token_ids):
            result[group] = encoder(ids, mask)
    return result


def _tokenize(checkpoint: EncoderCheckpoint, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Token ids with special tokens; a long text loses its end, not its closing token."""
    if not texts:
        raise InputError("an encoder is checked on at least one sentence; none was given")
    most = min(max_tokens, checkpoint.config.context_tokens)
    return encode_texts(checkpoint.tokenizer.tokenizer_json, texts, most)
