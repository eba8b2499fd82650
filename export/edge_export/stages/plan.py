"""plan: every decision about precision, and what it will cost on the board. `--dry-run` ends here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from edge_export.model.encoder import encoder_tensor_shapes
from edge_export.plan.encoder_formats import MatrixFormat, encoder_formats, encoder_weights
from edge_export.plan.plan import ExportPlan, plan_decoder
from edge_export.quantize import BlockFormat
from edge_export.stages.check import encoder_recipe
from edge_export.stages.costs import decoder_cost, encoder_cost, predicted_decoder, predicted_encoder
from edge_export.stages.values import Analysed, EncoderPlan, ModelKind, Planned, Run, extend
from edge_reasoner.contract.bundle.manifest import Predicted
from edge_reasoner.contract.profile.cost import GraphCost, require_fit
from edge_reasoner.errors import TargetError

_Decided = tuple[ExportPlan | EncoderPlan, GraphCost, Predicted]


def plan(run: Run, analysed: Analysed) -> Planned:
    """Raises TargetError where the board's memory or the wanted latency do not allow the plan."""
    decided, cost, predicted = _PLAN[analysed.kind](analysed)
    require_fit(cost, analysed.board)
    _check_latency(predicted, analysed.options.max_latency_ms)
    return extend(Planned, analysed, plan=decided, cost=cost, predicted=predicted)


def _decoder(analysed: Analysed) -> _Decided:
    config, options = analysed.decoder.config, analysed.options
    decided = plan_decoder(
        config,
        analysed.board,
        options.recipe,  # type: ignore[arg-type]  # checked by ExportOptions
        analysed.context_tokens,
        analysed.analysis,
        analysed.texts.calibration_sha256,
        options.quantizer,
    )
    cost = decoder_cost(config, decided)
    return decided, cost, predicted_decoder(cost, analysed.board)


def _encoder(analysed: Analysed) -> _Decided:
    config, board = analysed.encoder.config, analysed.board
    formats = encoder_formats(config, encoder_recipe(analysed.options.recipe))
    shapes = encoder_tensor_shapes(config)
    sizes: dict[str, int] = {}
    matrices: list[dict[str, Any]] = []
    for name, parts in encoder_weights(config):
        fmt, rows = formats.of(name), sum(shapes[part][0] for part in parts)
        columns = shapes[parts[0]][1:]
        sizes[name] = _stored_bytes(fmt, rows, columns[0] if columns else 1)
        if columns:
            matrices.append(
                {
                    "name": name.removesuffix(".weight"),
                    "rows": rows,
                    "columns": columns[0],
                    "format": fmt.label if isinstance(fmt, BlockFormat) else fmt,
                    "bytes": sizes[name],
                }
            )
    weight_bytes = sum(sizes.values())
    decided = EncoderPlan(formats.recipe, board.name, board.max_opset, weight_bytes, tuple(matrices))
    cost = encoder_cost(config, formats.recipe, weight_bytes, sizes["embed.word.weight"])
    return decided, cost, predicted_encoder(cost, board)


def _stored_bytes(fmt: MatrixFormat, rows: int, columns: int) -> int:
    if not isinstance(fmt, BlockFormat):
        return rows * columns * (2 if fmt == "float16" else 4)
    blocks = -(-columns // fmt.block_size)
    row_bytes = blocks * (fmt.block_size * fmt.bits // 8 + 4)
    return rows * (row_bytes if fmt.symmetric else row_bytes + -(-blocks * fmt.bits // 8))


def _check_latency(predicted: Predicted, limit_ms: float | None) -> None:
    """Of a decoder one token counts, of an encoder one text."""
    tps = predicted.decode_tps
    latency_ms, what = (predicted.ttft_ms, "a text") if tps is None else (1e3 / tps, "a token")
    if limit_ms is not None and latency_ms > limit_ms:
        raise TargetError(
            f"max_latency_ms={limit_ms:g}: {latency_ms:.3g} ms {what} are predicted on this board"
        )


_PLAN: Final[Mapping[ModelKind, Callable[[Analysed], _Decided]]] = MappingProxyType(
    {"decoder": _decoder, "encoder": _encoder}
)
