"""An encoder whose weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge_export.storage.matrices import StoredMatrix


@dataclass(frozen=True)
class StoredEncoder:
    """Where every weight of the graph lies in the data file."""

    weights: Mapping[str, StoredMatrix]
