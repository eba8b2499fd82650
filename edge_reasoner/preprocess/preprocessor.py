"""One look at a query before it is answered: its features and, given an encoder, one embedding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edge_reasoner.backends.base import EncoderModel
from edge_reasoner.engine.tokens import TextTokenizer
from edge_reasoner.errors import EdgeReasonerError
from edge_reasoner.preprocess.features import PromptFeatures, extract

#: A longer text is embedded from this many chunks spread over it: bounded work.
MAX_CHUNKS = 8


@dataclass(frozen=True)
class Preprocessed:
    """A query's features, its embedding (float32 [dimension], L2-normalized, or None) and what it took."""

    features: PromptFeatures
    embedding: NDArray[np.float32] | None
    preprocess_ms: float


class Preprocessor:
    """Thread-safe; works without an encoder (the embedding is then None)."""

    def __init__(
        self,
        session: EncoderModel | None,
        tokenizer: TextTokenizer | None,
        *,
        clock: Callable[[], float],
    ) -> None:
        """`clock` returns monotonic seconds. Session and tokenizer are given together or not at all."""
        if (session is None) != (tokenizer is None):
            raise ValueError("an encoder session and its tokenizer are given together or not at all")
        self._session = session
        self._tokenizer = tokenizer
        self._clock = clock

    def run(self, text: str) -> Preprocessed:
        """Looks at one query. An encoder that fails, or cannot read the text, costs the embedding only:
        whether the text can be answered is for the model to say."""
        start_s = self._clock()
        features = extract(text)
        try:
            embedding = self.embed(text)
        except EdgeReasonerError:
            embedding = None
        return Preprocessed(features, embedding, (self._clock() - start_s) * 1e3)

    def embed(self, text: str) -> NDArray[np.float32] | None:
        """The embedding of `text`: of a text beyond the encoder's context, the mean of its chunks'. Raises
        InputError for text that cannot be tokenized, BackendError."""
        if self._session is None or self._tokenizer is None:
            return None
        ids = self._tokenizer.encode(text, add_special=True)
        limit = self._session.context_tokens
        if len(ids) <= limit:
            return self._session.embed([ids])[0].copy() if ids else None
        vectors = self._session.embed(_chunks(self._tokenizer, text, limit))
        mean: NDArray[np.float32] = vectors.mean(axis=0, dtype=np.float32)
        return mean / max(float(np.linalg.norm(mean)), 1e-12)

    def close(self) -> None:
        """Releases the encoder."""
        if self._session is not None:
            self._session.close()


def _chunks(tokenizer: TextTokenizer, text: str, limit: int) -> list[list[int]]:
    # Every chunk gets the special tokens that a whole text has: those that frame an empty text.
    frame = tokenizer.encode("", add_special=True)
    head, tail = frame[: (len(frame) + 1) // 2], frame[(len(frame) + 1) // 2 :]
    body = tokenizer.encode(text)
    room = max(1, limit - len(frame))
    starts = list(range(0, len(body), room))
    if len(starts) > MAX_CHUNKS:
        starts = [starts[round(i * (len(starts) - 1) / (MAX_CHUNKS - 1))] for i in range(MAX_CHUNKS)]
    return [[*head, *body[start : start + room], *tail] for start in starts]
