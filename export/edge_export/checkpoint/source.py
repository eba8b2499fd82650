"""A checkpoint's weights under their canonical names: renamed, reordered and checked on the way out.

`RawTensors` is what a file format offers (GGUF, safetensors); `CheckpointSource` is the `TensorSource` that
every later stage reads. Nothing is kept: each call reads, dequantizes and returns a fresh float32 tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from edge_export.checkpoint.foreign import tensors_are
from edge_export.model.config import DecoderConfig
from edge_reasoner.errors import CheckpointError


class RawTensors(Protocol):
    """Tensors under the file's own names."""

    def has(self, name: str) -> bool:
        """Whether the file has the tensor."""

    def names(self) -> Iterable[str]:
        """Every tensor name."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape in torch's order. Raises CheckpointError if it is missing."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as fresh float32. Raises CheckpointError if missing or unreadable."""


@dataclass(frozen=True)
class Placement:
    """How one canonical tensor is stored."""

    raw_name: str
    shape: tuple[int, ...]
    #: added to every element (Gemma's norms in Hugging Face files)
    offset: float = 0.0
    #: rows are stored for interleaved rotary, in this many heads; 0 = they are not
    interleaved_heads: int = 0
    #: not stored: a bias that other layers have; it counts as zeros
    zeros: bool = False


def to_half_split(stored: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's row order for interleaved rotary: within each head 0, d/2, 1, d/2+1, … → 0, 1, 2, …"""
    head_dim = stored.shape[0] // heads
    paired = stored.reshape(heads, head_dim // 2, 2, *stored.shape[1:])
    return paired.swapaxes(1, 2).reshape(stored.shape).contiguous()


class CheckpointSource:
    """The `TensorSource` of a checkpoint. `where` names the file or folder in messages.

    Raises CheckpointError on construction if a tensor is missing or of another shape than its config says.
    """

    def __init__(self, raw: RawTensors, placements: Mapping[str, Placement], where: str) -> None:
        self._raw = raw
        self._placements = dict(placements)
        self._where = where
        for name, placement in self._placements.items():
            if placement.zeros:
                continue
            if not raw.has(placement.raw_name):
                hint = tensors_are(raw.names())
                raise CheckpointError(
                    f"{where}: the tensor {placement.raw_name!r} ({name}) is missing"
                    + (f"; {hint}" if hint else "")
                )
            found = raw.shape(placement.raw_name)
            if found != placement.shape:
                raise CheckpointError(
                    f"{where}: the tensor {placement.raw_name!r} has shape {list(found)}, but the model's "
                    f"configuration needs {list(placement.shape)}"
                )

    @property
    def raw_names(self) -> frozenset[str]:
        """The names, in the file, of the tensors that are used."""
        return frozenset(placement.raw_name for placement in self._placements.values())

    def names(self) -> Iterator[str]:
        """Every canonical name, in the order the model uses them."""
        return iter(self._placements)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape, without reading data. Raises CheckpointError for a name the model does not have."""
        return self._placement(name).shape

    def get(self, name: str) -> torch.Tensor:
        """The tensor as fresh contiguous float32. Raises CheckpointError if it is missing or corrupt."""
        return self.rows(name, 0, self.shape(name)[0])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) as fresh contiguous float32. Raises CheckpointError if missing or corrupt."""
        placement = self._placement(name)
        if not 0 <= start <= stop <= placement.shape[0]:
            raise CheckpointError(
                f"{self._where}: rows {start}:{stop} of {name!r} do not exist; it has {placement.shape[0]}"
            )
        if placement.zeros:
            return torch.zeros(stop - start, *placement.shape[1:])
        if placement.interleaved_heads:
            stored = self._raw.rows(placement.raw_name, 0, placement.shape[0])
            tensor = to_half_split(stored, placement.interleaved_heads)[start:stop].contiguous()
        else:
            tensor = self._raw.rows(placement.raw_name, start, stop)
        # A sum is one pass without temporaries; it is finite unless an element is not, or it overflows.
        # (numpy's: torch would wake its threads for every small tensor.)
        with np.errstate(all="ignore"):
            finite = bool(np.isfinite(tensor.numpy().sum()))
        if not finite and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{self._where}: corrupt: the tensor {placement.raw_name!r} contains NaN or infinity"
            )
        return tensor + placement.offset if placement.offset else tensor

    def _placement(self, name: str) -> Placement:
        try:
            return self._placements[name]
        except KeyError as error:
            raise CheckpointError(f"{self._where}: the model has no tensor {name!r}") from error


@dataclass(frozen=True)
class OpenedDecoder:
    """What a format's loader makes of a causal LM; `warnings` are whole sentences for the report."""

    config: DecoderConfig
    source: CheckpointSource
    weights_files: tuple[Path, ...]
    warnings: tuple[str, ...] = ()
