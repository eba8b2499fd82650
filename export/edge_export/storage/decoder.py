"""A decoder whose weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from edge_export.model.config import Rope
from edge_export.storage.matrices import DenseMatrix, KeptMatrices, StoredMatrix


@dataclass(frozen=True)
class StoredDecoder:
    """Where everything lies, and the check text's final states (head inputs, [T, hidden] each)."""

    weights: Mapping[str, StoredMatrix]
    ropes: Mapping[Rope, tuple[DenseMatrix, DenseMatrix]]
    #: through the stored weights
    expected_states: tuple[torch.Tensor, ...]
    #: through the original weights
    original_states: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class KeptDecoder:
    """A `StoredDecoder` in the plain shape that the stage cache writes and reads."""

    weights: KeptMatrices
    ropes: tuple[tuple[Rope, DenseMatrix, DenseMatrix], ...]
    expected_states: tuple[torch.Tensor, ...]
    original_states: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, stored: StoredDecoder) -> KeptDecoder:
        """What to keep of `stored`."""
        return cls(
            KeptMatrices.of(stored.weights),
            tuple((rope, cos, sin) for rope, (cos, sin) in stored.ropes.items()),
            stored.expected_states,
            stored.original_states,
        )

    def stored(self) -> StoredDecoder:
        """What was kept."""
        return StoredDecoder(
            self.weights.matrices(),
            {rope: (cos, sin) for rope, cos, sin in self.ropes},
            self.expected_states,
            self.original_states,
        )
