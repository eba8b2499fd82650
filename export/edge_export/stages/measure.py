"""measure: what the component is worth beside the original, on held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from edge_export.model.stream import original_head
from edge_export.stages.store import decoder_sequences
from edge_export.stages.values import Measured, ModelKind, Run, Verified, extend, of
from edge_export.stages.verify import verify_inputs
from edge_export.storage.decoder import StoredDecoder
from edge_export.verify.decoder import measure_quality
from edge_export.verify.encoder import encoder_quality
from edge_export.verify.variants import open_decoder, open_encoder
from edge_reasoner.contract.bundle.manifest import DecoderSpec, EncoderSpec
from edge_reasoner.errors import CheckFailedError

#: What a coarse recipe costs is a factor of two at most where a model is of any use.
_MOST_PERPLEXITY_RATIO: Final = 10.0
_MOST_TIMES_CHANCE: Final = 1e6
_LEAST_COSINE: Final = 0.5


@dataclass(frozen=True)
class _Quality:
    figures: dict[str, float]


def measure(run: Run, verified: Verified) -> Measured:
    """Figures of the fastest variant, to five digits. Raises CheckFailedError below the wanted quality."""
    quality = run.cache.remember(
        "measure",
        lambda: (*verify_inputs(verified), verified.variants[0], verified.texts),
        _Quality,
        lambda notes: _MEASURE[verified.kind](run, verified),
    )
    figures = {name: float(f"{value:.5g}") for name, value in quality.figures.items()}
    _check_quality(figures, verified.options.min_quality)
    warnings = (*verified.warnings, *quality_warnings(figures, _vocab_size(verified)))
    return extend(Measured, verified, quality=MappingProxyType(figures), warnings=warnings)


def quality_warnings(figures: Mapping[str, float], vocab_size: int | None) -> tuple[str, ...]:
    """Warnings of figures that only a damaged model has. Chance (a perplexity of the vocabulary's size) is
    none: a model that was never trained is there."""
    if "mean_cosine" in figures:
        cosine = figures["mean_cosine"]
        damaged = not cosine >= _LEAST_COSINE
        return (f"mean_cosine is {cosine:.4g}: the stored model is not usable",) if damaged else ()
    stored, original = figures["perplexity"], figures["original_perplexity"]
    ratio, chance = figures["perplexity_ratio"], float(vocab_size or 1)
    if not original <= _MOST_TIMES_CHANCE * chance:
        return (
            f"the model's own perplexity is {original:.3g}, far worse than chance ({chance:g}):"
            " its weights are damaged, or are read in a wrong way",
        )
    if not (math.isfinite(stored) and ratio <= _MOST_PERPLEXITY_RATIO):
        return (
            f"the stored model's perplexity is {stored:.3g}, {ratio:.3g} times the original's:"
            " it is not usable; choose another recipe, or look at the checkpoint",
        )
    return ()


def _vocab_size(verified: Verified) -> int | None:
    return verified.decoder.config.vocab_size if verified.kind == "decoder" else None


def _decoder(run: Run, verified: Verified) -> _Quality:
    checkpoint, stored = verified.decoder, of(StoredDecoder, verified.stored)
    spec, threads = of(DecoderSpec, verified.spec), verified.options.threads
    with open_decoder(run.bundle, spec, verified.variants[0], threads) as model:
        quality = measure_quality(
            checkpoint.config,
            model,
            verified.texts.quality,
            stored.original_states[len(decoder_sequences(verified)) :],
            original_head(checkpoint.config, checkpoint.source),
            run.progress,
        )
    return _Quality(quality.to_dict())


def _encoder(run: Run, verified: Verified) -> _Quality:
    run.progress("measuring the encoder", 0, 1)
    spec, threads = of(EncoderSpec, verified.spec), verified.options.threads
    with open_encoder(run.bundle, spec, verified.variants[0], threads) as model:
        return _Quality(encoder_quality(verified.encoder, model, verified.texts.sentences))


def _check_quality(quality: Mapping[str, float], least: float | None) -> None:
    name = "top1_agreement" if "top1_agreement" in quality else "mean_cosine"
    if least is not None and quality[name] < least:
        raise CheckFailedError(f"min_quality={least:g}: {name} is {quality[name]:.4f}; nothing was written")


_MEASURE: Final[Mapping[ModelKind, Callable[[Run, Verified], _Quality]]] = MappingProxyType(
    {"decoder": _decoder, "encoder": _encoder}
)
