"""A decoder whose weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from edge_export.model.config import Rope
from edge_export.storage.matrices import DenseMatrix, StoredMatrix


@dataclass(frozen=True)
class StoredDecoder:
    """Where everything lies, and the check text's final states (head inputs, [T, hidden] each)."""

    weights: Mapping[str, StoredMatrix]
    ropes: Mapping[Rope, tuple[DenseMatrix, DenseMatrix]]
    #: through the stored weights
    expected_states: tuple[torch.Tensor, ...]
    #: through the original weights
    original_states: tuple[torch.Tensor, ...]
