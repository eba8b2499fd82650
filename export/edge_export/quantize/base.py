"""Quantized weights as plain data: a quantizer returns them, a lowering writes them.

The storage layout is the one that ONNX's `MatMulNBits` and `GatherBlockQuantized` read, which is also the
densest one: blocks along the input dimension, unsigned integers, low nibble first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from edge_export.quantize.formats import BlockFormat


@dataclass(frozen=True)
class BlockQuantized:
    """A quantized matrix [rows, columns].

    `packed` uint8 [rows, blocks, block_size·bits/8]; `scales` float32 [rows, blocks]; `zero_points` uint8
    [rows, ceil(blocks·bits/8)], or None for the implied middle (8 or 128). value = (q − zero) · scale.
    """

    format: BlockFormat
    rows: int
    columns: int
    packed: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None

    @property
    def size_bytes(self) -> int:
        """Bytes stored."""
        return (
            self.packed.nbytes
            + self.scales.nbytes
            + (0 if self.zero_points is None else self.zero_points.nbytes)
        )

    def dequantize(self) -> torch.Tensor:
        """float32 [rows, columns]: exactly the weights that the graph computes with."""
        bits, blocks = self.format.bits, self.scales.shape[1]
        q = _unpack(self.packed, bits).astype(np.float32)
        if self.zero_points is None:
            q -= 1 << (bits - 1)
        else:
            q -= _unpack(self.zero_points, bits)[:, :blocks, None]
        q *= self.scales[:, :, None]
        return torch.from_numpy(q.reshape(self.rows, -1)[:, : self.columns].copy())


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of a matrix's inputs over calibration data.

    `mean_square` float32 [columns]: the error of a column weighs that much. `correlation`: E[x·xᵀ] float32 in
    square diagonal blocks that together cover all columns, or None where only `mean_square` is known.
    """

    mean_square: torch.Tensor
    correlation: tuple[torch.Tensor, ...] | None = None


class Quantizer(Protocol):
    """Turns a float32 matrix [rows, columns] into stored data."""

    def quantize(
        self, weight: torch.Tensor, fmt: BlockFormat, inputs: InputStatistics | None = None
    ) -> BlockQuantized:
        """Quantizes; `weight` is not modified."""


def pack_blocks(
    q: torch.Tensor, scales: torch.Tensor, zero_points: torch.Tensor | None, fmt: BlockFormat, columns: int
) -> BlockQuantized:
    """Packs codes [rows, blocks, block_size] (0 … 2^bits − 1), scales and zero points [rows, blocks]."""
    rows = q.shape[0]
    packed = _pack(q.to(torch.uint8).numpy(), fmt.bits)
    zeros = None
    if zero_points is not None:
        zeros = _pack(zero_points.to(torch.uint8).numpy(), fmt.bits)
    return BlockQuantized(fmt, rows, columns, packed, scales.to(torch.float32).contiguous().numpy(), zeros)


def to_blocks(weight: torch.Tensor, block_size: int) -> torch.Tensor:
    """[rows, columns] → [rows, blocks, block_size], zero-padded at the end of each row."""
    rows, columns = weight.shape
    blocks = -(-columns // block_size)
    if blocks * block_size != columns:
        weight = torch.nn.functional.pad(weight, (0, blocks * block_size - columns))
    return weight.reshape(rows, blocks, block_size)


def _pack(values: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Packs along the last axis, low nibble first; an odd length is padded with zero."""
    if bits == 8:
        return np.ascontiguousarray(values)
    if values.shape[-1] % 2:
        values = np.concatenate([values, np.zeros_like(values[..., :1])], axis=-1)
    return np.ascontiguousarray(values[..., 0::2] | (values[..., 1::2] << 4))


def _unpack(packed: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """The inverse of `_pack` (a padding nibble stays)."""
    if bits == 8:
        return packed
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), dtype=np.uint8)
    out[..., 0::2] = packed & 15
    out[..., 1::2] = packed >> 4
    return out
