"""One model with one cache, for tests that feed one sequence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edge_reasoner.backends.base import DecoderModel, KVCache


class OneSequence:
    """A model and a cache of it, closed together."""

    def __init__(self, model: DecoderModel, context_tokens: int | None = None) -> None:
        self.model = model
        self.cache: KVCache = model.new_cache(context_tokens)

    @property
    def length_tokens(self) -> int:
        """Tokens now in the cache."""
        return self.cache.length_tokens

    def extend(self, token_ids: NDArray[np.int64], num_logits: int = 1) -> NDArray[np.float32]:
        """The logits of the last positions: a view, as the model gives it."""
        return self.model.extend(self.cache, token_ids, num_logits).logits

    def rewind(self, length_tokens: int) -> None:
        """Forgets what follows."""
        self.cache.rewind(length_tokens)

    def close(self) -> None:
        """Closes cache and model."""
        self.cache.close()
        self.model.close()
