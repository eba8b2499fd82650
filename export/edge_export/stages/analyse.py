"""analyse: what calibration text says about the weights, where the recipe or its quantizer asks for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from edge_export.plan.analysis import Analysis, analyse_importance, analyse_losses
from edge_export.plan.plan import int4_format, needs_importance, needs_losses
from edge_export.quantize.rtn import SearchedScale
from edge_export.stages.values import Analysed, Checked, ModelKind, Run, extend

_SEED: Final = 0
#: Scales tried per block where a quantizer only serves to estimate a loss.
_ROUGH_CANDIDATES: Final = 5


def analyse(run: Run, checked: Checked) -> Analysed:
    """One pass forward over the calibration text, or one forward and one backward. Changes no weight."""
    return extend(Analysed, checked, analysis=_ANALYSE[checked.kind](run, checked))


def analysis_inputs(checked: Checked) -> tuple[Any, ...]:
    """What the analysis depends on."""
    recipe = checked.options.recipe
    losses = needs_losses(recipe)  # type: ignore[arg-type]
    fmt = int4_format(checked.board) if losses else None
    return *checked.identity, checked.texts.calibration, fmt, _SEED, _ROUGH_CANDIDATES


def _decoder(run: Run, checked: Checked) -> Analysis | None:
    recipe: Any = checked.options.recipe
    checkpoint, texts = checked.decoder, checked.texts.calibration
    config, source = checkpoint.config, checkpoint.source
    make: Callable[[Any], Analysis]
    if needs_losses(recipe):
        # The backward pass, which costs most, sees half of each text: an order needs less than GPTQ does.
        halves = [tokens[: max(2, len(tokens) // 2)] for tokens in texts]
        rough, fmt = SearchedScale(_ROUGH_CANDIDATES), int4_format(checked.board)

        def make(notes: Any) -> Analysis:
            return analyse_losses(config, source, halves, rough, fmt, _SEED, run.progress)

    elif needs_importance(recipe) and checked.options.quantizer != "rtn":

        def make(notes: Any) -> Analysis:
            return analyse_importance(config, source, texts, run.progress)

    else:
        return None
    return run.cache.remember("analyse", lambda: analysis_inputs(checked), Analysis, make)


def _nothing(run: Run, checked: Checked) -> None:
    return None


_ANALYSE: Final[Mapping[ModelKind, Callable[[Run, Checked], Analysis | None]]] = MappingProxyType(
    {"decoder": _decoder, "encoder": _nothing}
)
