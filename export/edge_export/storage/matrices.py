"""Stored weights: how each lies in the external data file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edge_export.quantize.base import BlockQuantized
from edge_export.quantize.formats import BlockFormat, FloatType
from edge_export.storage.external_data import ExternalData, Region, read_region

_NUMPY_FLOAT = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class DenseMatrix:
    """A float matrix or vector stored as it is, in torch's layout."""

    region: Region
    shape: tuple[int, ...]
    dtype: FloatType

    @property
    def size_bytes(self) -> int:
        """Bytes stored."""
        return self.region.size_bytes


@dataclass(frozen=True)
class BlockMatrix:
    """A block-quantized matrix."""

    format: BlockFormat
    rows: int
    columns: int
    blocks: int
    packed: Region
    scales: Region
    zero_points: Region | None

    @property
    def shape(self) -> tuple[int, int]:
        """[rows, columns]."""
        return self.rows, self.columns

    @property
    def size_bytes(self) -> int:
        """Bytes stored."""
        zero_bytes = 0 if self.zero_points is None else self.zero_points.size_bytes
        return self.packed.size_bytes + self.scales.size_bytes + zero_bytes


StoredMatrix = DenseMatrix | BlockMatrix


@dataclass(frozen=True)
class KeptMatrices:
    """Stored matrices by name, in the plain shape that the stage cache writes and reads."""

    dense: Mapping[str, DenseMatrix]
    blocks: Mapping[str, BlockMatrix]

    @classmethod
    def of(cls, matrices: Mapping[str, StoredMatrix]) -> KeptMatrices:
        """What to keep of `matrices`."""
        return cls(
            {name: matrix for name, matrix in matrices.items() if isinstance(matrix, DenseMatrix)},
            {name: matrix for name, matrix in matrices.items() if isinstance(matrix, BlockMatrix)},
        )

    def matrices(self) -> dict[str, StoredMatrix]:
        """What was kept."""
        return {**self.dense, **self.blocks}


def to_float16(weight: torch.Tensor) -> torch.Tensor:
    """float16, saturating instead of overflowing to infinity."""
    limit = torch.finfo(torch.float16).max
    return weight.clamp(-limit, limit).to(torch.float16)


def store_dense(data: ExternalData, weight: torch.Tensor, dtype: FloatType) -> DenseMatrix:
    """Writes float weights."""
    array = (to_float16(weight) if dtype == "float16" else weight).numpy()
    return DenseMatrix(data.append(array), tuple(weight.shape), dtype)


def store_dense_in_parts(
    data: ExternalData, parts: Iterable[torch.Tensor], dtype: FloatType, rows: int, columns: int
) -> DenseMatrix:
    """Writes a large float matrix slice by slice."""
    arrays = ((to_float16(part) if dtype == "float16" else part).numpy() for part in parts)
    size_bytes = rows * columns * np.dtype(_NUMPY_FLOAT[dtype]).itemsize
    return DenseMatrix(data.append_parts(arrays, size_bytes), (rows, columns), dtype)


def store_blocks(data: ExternalData, quantized: BlockQuantized) -> BlockMatrix:
    """Writes a quantized matrix."""
    zeros = None if quantized.zero_points is None else data.append(quantized.zero_points)
    return BlockMatrix(
        quantized.format,
        quantized.rows,
        quantized.columns,
        quantized.scales.shape[1],
        data.append(quantized.packed),
        data.append(quantized.scales),
        zeros,
    )


def store_blocks_in_parts(
    data: ExternalData, parts: Iterable[BlockQuantized], fmt: BlockFormat, rows: int, columns: int
) -> BlockMatrix:
    """Writes a large matrix whose row slices are quantized one after another, never all in memory."""
    blocks = -(-columns // fmt.block_size)
    scales: list[NDArray[np.float32]] = []
    zeros: list[NDArray[np.uint8]] = []

    def packed() -> Iterator[NDArray[np.uint8]]:
        for part in parts:
            scales.append(part.scales)
            if part.zero_points is not None:
                zeros.append(part.zero_points)
            yield part.packed

    region = data.append_parts(packed(), rows * blocks * fmt.block_size * fmt.bits // 8)
    return BlockMatrix(
        fmt,
        rows,
        columns,
        blocks,
        region,
        data.append(np.concatenate(scales)),
        data.append(np.concatenate(zeros)) if zeros else None,
    )


def stored_rows(data_path: Path, stored: StoredMatrix, start: int, stop: int) -> torch.Tensor:
    """Rows [start, stop) of a stored matrix as float32: exactly what a graph computes with."""
    if isinstance(stored, DenseMatrix):
        row_bytes = stored.region.size_bytes // stored.shape[0]
        part = Region(stored.region.offset + start * row_bytes, (stop - start) * row_bytes)
        shape = (stop - start, *stored.shape[1:])
        array = read_region(data_path, part, _NUMPY_FLOAT[stored.dtype], shape)
        return torch.from_numpy(array.astype(np.float32, copy=False))
    fmt = stored.format
    count = stop - start

    def cut(region: Region, dtype: Any, width: int) -> NDArray[Any]:
        row_bytes = width * np.dtype(dtype).itemsize
        part = Region(region.offset + start * row_bytes, count * row_bytes)
        return read_region(data_path, part, dtype, (count, width))

    block_bytes = fmt.block_size * fmt.bits // 8
    zero_bytes = -(-stored.blocks * fmt.bits // 8)
    quantized = BlockQuantized(
        fmt,
        count,
        stored.columns,
        cut(stored.packed, np.uint8, stored.blocks * block_bytes).reshape(count, stored.blocks, block_bytes),
        cut(stored.scales, np.float32, stored.blocks),
        None if stored.zero_points is None else cut(stored.zero_points, np.uint8, zero_bytes),
    )
    return quantized.dequantize()
