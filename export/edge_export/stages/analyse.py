"""analyse: what calibration text says about the weights, where the recipe or its quantizer asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from edge_export.plan.analysis import Analysis, analyse_importance, analyse_losses
from edge_export.plan.encoder import EncoderAnalysis, encoder_target, needs_analysis
from edge_export.plan.encoder_analysis import analyse_encoder
from edge_export.plan.plan import decoder_target, needs_losses, needs_statistics
from edge_export.plan.recipes import BoardFormats
from edge_export.quantize.rtn import SearchedScale
from edge_export.stages.values import Analysed, Checked, ModelKind, Run, extend

_SEED: Final = 0
#: Scales tried per block where a quantizer only serves to estimate a loss.
_ROUGH_CANDIDATES: Final = 5


def analyse(run: Run, checked: Checked) -> Analysed:
    """Passes over the calibration text, forward or both ways. Changes no weight."""
    return extend(Analysed, checked, analysis=_ANALYSE[checked.kind](run, checked))


def analysis_inputs(checked: Checked) -> tuple[Any, ...]:
    """What the analysis depends on."""
    texts = checked.texts.calibration
    if checked.kind == "encoder":
        return *checked.identity, texts
    losses = needs_losses(_decoder_recipe(checked))
    fmt = BoardFormats.of(checked.board).int4 if losses else None
    return *checked.identity, texts, fmt, _SEED, _ROUGH_CANDIDATES


def _decoder_recipe(checked: Checked) -> str:
    return decoder_target(checked.decoder.config, checked.board, checked.options.recipe).recipe.name


def _decoder(run: Run, checked: Checked) -> Analysis | None:
    recipe = _decoder_recipe(checked)
    checkpoint, texts = checked.decoder, checked.texts.calibration
    config, source = checkpoint.config, checkpoint.source
    make: Callable[[Any], Analysis]
    if needs_losses(recipe):
        # The backward pass, which costs most, sees half of each text: an order needs less than GPTQ does.
        halves = [tokens[: max(2, len(tokens) // 2)] for tokens in texts]
        rough, fmt = SearchedScale(_ROUGH_CANDIDATES), BoardFormats.of(checked.board).int4

        def make(notes: Any) -> Analysis:
            return analyse_losses(config, source, halves, rough, fmt, _SEED, run.progress)

    elif needs_statistics(recipe, checked.options.quantizer):

        def make(notes: Any) -> Analysis:
            return analyse_importance(config, source, texts, run.progress)

    else:
        return None
    return run.cache.remember("analyse", lambda: analysis_inputs(checked), Analysis, make)


def _encoder(run: Run, checked: Checked) -> EncoderAnalysis | None:
    config, source = checked.encoder.config, checked.encoder.source
    if not needs_analysis(encoder_target(config, checked.board, checked.options.recipe).recipe):
        return None
    token_ids = [ids.tolist() for ids in checked.texts.calibration]
    return run.cache.remember(
        "analyse",
        lambda: analysis_inputs(checked),
        EncoderAnalysis,
        lambda notes: analyse_encoder(config, source, token_ids, run.progress),
    )


_ANALYSE: Final[Mapping[ModelKind, Callable[[Run, Checked], Analysis | EncoderAnalysis | None]]] = (
    MappingProxyType({"decoder": _decoder, "encoder": _encoder})
)
