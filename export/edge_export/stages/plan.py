"""plan: every decision about precision, and what it will cost on the board. `--dry-run` ends here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from edge_export.plan.analysis import Analysis
from edge_export.plan.encoder import EncoderAnalysis, EncoderPlan, plan_encoder
from edge_export.plan.plan import ExportPlan, plan_decoder
from edge_export.stages.costs import (
    check_size,
    decoder_cost,
    encoder_cost,
    predicted_decoder,
    predicted_encoder,
)
from edge_export.stages.values import Analysed, ModelKind, Planned, Run, extend, of
from edge_reasoner.contract.bundle.manifest import Predicted
from edge_reasoner.contract.profile.cost import GraphCost, require_fit
from edge_reasoner.errors import TargetError

#: What an encoder's bundle holds beside weights: graphs, tokenizer, golden vectors, report (MiniLM: 0.9 MB).
_BESIDE_WEIGHTS_BYTES: Final = 1e6
_Decided = tuple[ExportPlan | EncoderPlan, GraphCost, Predicted]


def plan(run: Run, analysed: Analysed) -> Planned:
    """Raises TargetError where the board's memory or the wanted latency do not allow the plan,
    CheckFailedError where its weights are larger than the wanted bundle."""
    decided, cost, predicted = _PLAN[analysed.kind](analysed)
    _check_latency(predicted, analysed.options.max_latency_ms)
    return extend(Planned, analysed, plan=decided, cost=cost, predicted=predicted)


def _decoder(analysed: Analysed) -> _Decided:
    config, options = analysed.decoder.config, analysed.options
    decided = plan_decoder(
        config,
        analysed.board,
        options.recipe,
        analysed.context_tokens,
        None if analysed.analysis is None else of(Analysis, analysed.analysis),
        analysed.texts.calibration_sha256,
        options.quantizer,
    )
    check_size(decided.weight_bytes, options.max_size_mb)
    cost = decoder_cost(config, decided)
    require_fit(cost, analysed.board)
    return decided, cost, predicted_decoder(cost, analysed.board)


def _encoder(analysed: Analysed) -> _Decided:
    config, board, limit_mb = analysed.encoder.config, analysed.board, analysed.options.max_size_mb
    decided = plan_encoder(
        config,
        board,
        analysed.options.recipe,
        None if analysed.analysis is None else of(EncoderAnalysis, analysed.analysis),
        analysed.texts.calibration_sha256,
        None if limit_mb is None else max(1.0, limit_mb * 1e6 - _BESIDE_WEIGHTS_BYTES),
    )
    cost = encoder_cost(config, decided)
    require_fit(cost, board, chunk_tokens=config.context_tokens)
    return decided, cost, predicted_encoder(cost, board)


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
