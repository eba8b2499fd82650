"""Round-to-nearest, and round-to-nearest with a searched scale."""

from __future__ import annotations

import torch

from edge_export.quantize.base import BlockQuantized, InputStatistics, pack_blocks, to_blocks
from edge_export.quantize.formats import BlockFormat


class RoundToNearest:
    """Each block's scale from its largest value; every weight goes to the nearest code.

    Symmetric: the value of the largest magnitude, with its sign, maps to the lowest code, as in llama.cpp's
    Q4_0 and onnxruntime's default (it uses all 2^bits codes; max/7.5-style rules do not). Asymmetric: scale
    from max − min with an integer zero point.
    """

    def quantize(
        self, weight: torch.Tensor, fmt: BlockFormat, inputs: InputStatistics | None = None
    ) -> BlockQuantized:
        """Quantizes [rows, columns]; `inputs` are not looked at."""
        blocks = to_blocks(weight, fmt.block_size)
        scales, zeros = initial_grid(blocks, fmt)
        return _finish(blocks, scales, zeros, fmt, weight.shape[1])


class SearchedScale:
    """Round-to-nearest after a search over slightly smaller and larger scales for each block.

    Chooses, per block, the candidate with the least error Σ importance·(w − ŵ)², then refits the scale by
    weighted least squares for the codes found. The idea is that of llama.cpp's `make_qx_quants` and of
    onnxruntime's `k_quant`; the candidates are a fixed grid, so the result is deterministic.
    """

    def __init__(self, candidates: int = 11, spread: float = 0.18) -> None:
        self._factors = [1.0 + spread * (2.0 * i / (candidates - 1) - 1.0) for i in range(candidates)]

    def quantize(
        self, weight: torch.Tensor, fmt: BlockFormat, inputs: InputStatistics | None = None
    ) -> BlockQuantized:
        """Quantizes [rows, columns], weighing columns by `inputs.mean_square`, or all alike."""
        blocks = to_blocks(weight, fmt.block_size)
        importance = torch.ones(1, *blocks.shape[1:])
        if inputs is not None:
            importance = to_blocks(inputs.mean_square.reshape(1, -1), fmt.block_size)
        scales, zeros = self.grid(blocks, fmt, importance)
        return _finish(blocks, scales, zeros, fmt, weight.shape[1])

    def grid(
        self, blocks: torch.Tensor, fmt: BlockFormat, importance: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Best scales and zero points [rows, blocks] for weights [rows, blocks, block_size].

        `importance` [1, blocks, block_size] weighs the columns.
        """
        importance = importance / importance.mean().clamp_min(1e-30) + 1e-3
        best_scales, best_zeros = initial_grid(blocks, fmt)
        best_error = _error(blocks, best_scales, best_zeros, fmt, importance)
        base_scales, low = best_scales, blocks.amin(-1)
        for factor in self._factors:
            scales = base_scales * factor
            zeros = best_zeros
            if not fmt.symmetric:
                zeros = (-low / scales).round().clamp(0, 2**fmt.bits - 1)
            scales = _refit(blocks, scales, zeros, fmt, importance)
            error = _error(blocks, scales, zeros, fmt, importance)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scales = torch.where(better, scales, best_scales)
            if zeros is not None and best_zeros is not None:
                best_zeros = torch.where(better, zeros, best_zeros)
        return best_scales, best_zeros


def initial_grid(blocks: torch.Tensor, fmt: BlockFormat) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Max-based scales and zero points (None if symmetric) of [rows, blocks, block_size] weights."""
    half, top = 1 << (fmt.bits - 1), (1 << fmt.bits) - 1
    if fmt.symmetric:
        index = blocks.abs().argmax(-1, keepdim=True)
        extreme = blocks.gather(-1, index).squeeze(-1)
        scales = -extreme / half
        return torch.where(scales == 0, torch.ones_like(scales), scales), None
    low, high = blocks.amin(-1).clamp_max(0), blocks.amax(-1).clamp_min(0)
    scales = (high - low) / top
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    return scales, (-low / scales).round().clamp(0, top)


def _codes(
    blocks: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, fmt: BlockFormat
) -> torch.Tensor:
    """Nearest codes, float [rows, blocks, block_size]."""
    zero = float(1 << (fmt.bits - 1)) if zeros is None else zeros.unsqueeze(-1)
    return (blocks / scales.unsqueeze(-1)).round().add_(zero).clamp_(0, (1 << fmt.bits) - 1)


def _centred(codes: torch.Tensor, zeros: torch.Tensor | None, fmt: BlockFormat) -> torch.Tensor:
    return codes - (float(1 << (fmt.bits - 1)) if zeros is None else zeros.unsqueeze(-1))


def _error(
    blocks: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    fmt: BlockFormat,
    importance: torch.Tensor,
) -> torch.Tensor:
    back = _centred(_codes(blocks, scales, zeros, fmt), zeros, fmt) * scales.unsqueeze(-1)
    return ((back - blocks).square_() * importance).sum(-1)


def _refit(
    blocks: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    fmt: BlockFormat,
    importance: torch.Tensor,
) -> torch.Tensor:
    """The least-squares scale for the codes that `scales` gives."""
    q = _centred(_codes(blocks, scales, zeros, fmt), zeros, fmt)
    bottom = (q.square() * importance).sum(-1)
    fitted = (q * blocks * importance).sum(-1) / bottom.clamp_min(1e-30)
    return torch.where((bottom == 0) | (fitted == 0), scales, fitted)


def _finish(
    blocks: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, fmt: BlockFormat, columns: int
) -> BlockQuantized:
    codes = _codes(blocks, scales, zeros, fmt)
    if columns % fmt.block_size:
        # The padding must decode to zero whatever the kernel multiplies it with.
        zero = torch.tensor(float(1 << (fmt.bits - 1))) if zeros is None else zeros[:, -1:]
        codes[:, -1, columns % fmt.block_size :] = zero
    return pack_blocks(codes, scales, zeros, fmt, columns)
