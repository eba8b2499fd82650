"""GPTQ: rounds one input column after another and lets the columns to come make up for the error.

Frantar et al., arXiv 2210.17323, on block formats: each block's scale is searched on the weights as the
earlier columns have left them. Rows are independent, so a large vocabulary matrix is worked off in slices.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from edge_export.quantize.base import BlockQuantized, InputStatistics, pack_blocks, to_blocks
from edge_export.quantize.formats import BlockFormat
from edge_export.quantize.rtn import SearchedScale
from edge_reasoner.errors import CheckpointError

_ROW_SLICE = 16_384


@dataclass(frozen=True)
class Gptq:
    """GPTQ with a searched scale. Without input correlations it is `SearchedScale`."""

    search: SearchedScale = field(default_factory=SearchedScale)
    #: share of the mean diagonal that is added to the Hessian's diagonal
    damping: float = 0.02

    def quantize(
        self, weight: torch.Tensor, fmt: BlockFormat, inputs: InputStatistics | None = None
    ) -> BlockQuantized:
        """Quantizes [rows, columns] for inputs with the given second moments. Raises CheckpointError where
        these are not finite."""
        if inputs is None or inputs.correlation is None:
            return self.search.quantize(weight, fmt, inputs)
        factors = [self._inverse_factor(part) for part in inputs.correlation]
        importance = inputs.mean_square
        slices = [
            self._slice(weight[start : start + _ROW_SLICE], fmt, factors, importance)
            for start in range(0, weight.shape[0], _ROW_SLICE)
        ]
        codes = torch.cat([codes for codes, _, _ in slices])
        scales = torch.cat([scales for _, scales, _ in slices])
        zeros = torch.cat([zeros for _, _, zeros in slices]) if not fmt.symmetric else None
        return pack_blocks(codes, scales, zeros, fmt, weight.shape[1])

    def _inverse_factor(self, hessian: torch.Tensor) -> torch.Tensor:
        """Upper Cholesky factor of the damped inverse, float32 [columns, columns]."""
        wide = hessian.to(torch.float64)
        diagonal = wide.diagonal()
        mean = float(diagonal.mean())
        damped = wide + torch.eye(len(wide), dtype=torch.float64) * max(self.damping * mean, 1e-12)
        lower, flaw = torch.linalg.cholesky_ex(damped)
        factor, other_flaw = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if flaw or other_flaw or not torch.isfinite(factor).all():
            # what is damped has a factor, unless it is not finite or next to it
            raise CheckpointError(
                "GPTQ: the model's hidden states on the calibration text are beyond what float32 can hold: "
                "its weights are damaged"
            )
        narrow: torch.Tensor = factor.to(torch.float32)
        return narrow

    def _slice(
        self, weight: torch.Tensor, fmt: BlockFormat, factors: list[torch.Tensor], importance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Codes uint8 [rows, blocks, block_size], scales and zero points [rows, blocks]."""
        rows, columns = weight.shape
        blocks = -(-columns // fmt.block_size)
        middle = float(1 << (fmt.bits - 1))
        codes = torch.full((rows, blocks * fmt.block_size), middle)
        scales, zeros = torch.empty(rows, blocks), torch.full((rows, blocks), middle)
        top = float((1 << fmt.bits) - 1)
        first = 0
        for factor in factors:
            width = len(factor)
            # Columns in memory order: every step below reads and writes whole columns.
            work = weight[:, first : first + width].T.contiguous()
            for start in range(0, width, fmt.block_size):
                stop = min(start + fmt.block_size, width)
                block = (first + start) // fmt.block_size
                grid = self.search.grid(
                    to_blocks(work[start:stop].T, fmt.block_size),
                    fmt,
                    to_blocks(importance[None, first + start : first + stop], fmt.block_size),
                )
                scale, zero = grid[0][:, 0], middle if grid[1] is None else grid[1][:, 0]
                scales[:, block] = scale
                zeros[:, block] = zero
                errors = torch.empty(stop - start, rows)
                for column in range(start, stop):
                    values = work[column]
                    code = (values / scale).round_().add_(zero).clamp_(0, top)
                    codes[:, first + column] = code
                    error = (values - (code - zero) * scale) / factor[column, column]
                    errors[column - start] = error
                    work[column + 1 : stop] -= torch.outer(factor[column, column + 1 : stop], error)
                if stop < width:
                    work[stop:] -= factor[start:stop, stop:].T @ errors
            if (first + width) % fmt.block_size:
                codes[:, first + width :] = zeros[:, -1:]
            first += width
        return codes.to(torch.uint8).reshape(rows, blocks, fmt.block_size), scales, zeros
