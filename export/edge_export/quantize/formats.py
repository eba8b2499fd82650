"""Formats of quantized matrices: plain values, known without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Bits = Literal[4, 8]
FloatType = Literal["float32", "float16"]


@dataclass(frozen=True)
class BlockFormat:
    """How a matrix is stored: `bits` per weight, one float32 scale per `block_size` inputs of a row."""

    bits: Bits
    block_size: int
    symmetric: bool

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits: {self.bits}; allowed: 4, 8")
        if self.block_size < 16 or self.block_size & (self.block_size - 1):
            raise ValueError(f"block_size: {self.block_size}; allowed: powers of two from 16")

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales and zero points included."""
        zero_point_bits = 0 if self.symmetric else self.bits
        return self.bits + (32 + zero_point_bits) / self.block_size

    @property
    def label(self) -> str:
        """Short name, e.g. `int4-b32-asym`."""
        return f"int{self.bits}-b{self.block_size}-{'sym' if self.symmetric else 'asym'}"


#: how a matrix is stored: in blocks, or as floats
MatrixFormat = BlockFormat | FloatType


def format_label(fmt: MatrixFormat) -> str:
    """E.g. `int4-b32-asym` or `float16`."""
    return fmt.label if isinstance(fmt, BlockFormat) else fmt


def stored_bytes(fmt: MatrixFormat, rows: int, columns: int) -> int:
    """Bytes of a matrix [rows, columns] in that format, scales and zero points included."""
    if not isinstance(fmt, BlockFormat):
        return rows * columns * (2 if fmt == "float16" else 4)
    blocks = -(-columns // fmt.block_size)
    row_bytes = blocks * fmt.block_size * fmt.bits // 8 + 4 * blocks
    if not fmt.symmetric:
        row_bytes += -(-blocks * fmt.bits // 8)
    return rows * row_bytes
