"""check: refuses what the board cannot take, in the first seconds; reads the texts to measure on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

import torch

from edge_export.checkpoint.tokenizer_files import encode_texts, open_tokenizer
from edge_export.data.texts import TextSet, calibration_text, probe_text, read_text_set, to_token_batches
from edge_export.model.config import DecoderConfig
from edge_export.options import ExportOptions
from edge_export.plan.encoder import encoder_target, needs_analysis, smallest_encoder_plan
from edge_export.plan.encoder_analysis import analysis_tokens
from edge_export.plan.plan import check_decoder, smallest_plan
from edge_export.plan.units import decoder_units
from edge_export.stages.costs import check_size, decoder_cost, encoder_cost
from edge_export.stages.values import Checked, Loaded, ModelKind, Run, Texts, extend
from edge_reasoner.contract.profile.cost import require_fit
from edge_reasoner.errors import InputError
from edge_reasoner.machine.memory import total_bytes

#: Calibration work grows with both: a larger model needs fewer tokens to show which inputs matter.
_CALIBRATION_WORK: Final = 6e11
_MAX_CALIBRATION_TOKENS, _MIN_CALIBRATION_TOKENS = 2048, 384
_MAX_QUALITY_TOKENS: Final = 1024
_SEQUENCE_TOKENS: Final = 512
_MAX_SENTENCES: Final = 256
#: of a sentence that an encoder is calibrated on
_MAX_SENTENCE_TOKENS: Final = 96


def check(run: Run, loaded: Loaded) -> Checked:
    """Operators, shapes, memory and context. Raises TargetError, or InputError for options out of range."""
    context_tokens, texts = _CHECK[loaded.kind](loaded)
    return extend(Checked, loaded, context_tokens=context_tokens, texts=texts)


def _decoder(loaded: Loaded) -> tuple[int, Texts]:
    config, board, recipe = loaded.decoder.config, loaded.board, loaded.options.recipe
    require_memory_here(config, total_bytes())
    context = check_decoder(config, board, recipe, loaded.options.context_tokens)
    smallest = smallest_plan(config, board, recipe, context)
    require_fit(decoder_cost(config, smallest), board)
    check_size(smallest.weight_bytes, loaded.options.max_size_mb)
    return context, _token_texts(loaded)


def require_memory_here(config: DecoderConfig, memory_bytes: int | None) -> None:
    """Refuses what this machine (not the board) cannot hold: the largest layer in float32, the least that an
    export has in memory at once.

    `memory_bytes`: all there is, for the system can make room; None: unknown. Raises InputError.
    """
    layers: dict[int | None, int] = {}
    for unit in decoder_units(config):
        if unit.layer is not None:
            layers[unit.layer] = layers.get(unit.layer, 0) + 4 * unit.parameters
    needed_bytes = max(layers.values(), default=0)
    if memory_bytes is not None and needed_bytes > memory_bytes:
        raise InputError(
            f"one layer takes {needed_bytes / 1e9:.2f} GB while it is exported; this machine or its container"
            f" has {memory_bytes / 1e9:.2f} GB: export on a larger one"
        )


def _encoder(loaded: Loaded) -> tuple[int, Texts]:
    config, options = loaded.encoder.config, loaded.options
    smallest = smallest_encoder_plan(config, loaded.board, options.recipe)
    require_fit(encoder_cost(config, smallest), loaded.board, chunk_tokens=config.context_tokens)
    sentences = tuple(_lines(_quality_text(options))[:_MAX_SENTENCES])
    if not needs_analysis(encoder_target(config, loaded.board, options.recipe).recipe):
        return config.context_tokens, Texts(sentences=sentences)
    calibration = _calibration_text(options)
    return config.context_tokens, Texts(_sentence_ids(loaded, calibration), calibration.sha256, (), sentences)


def _sentence_ids(loaded: Loaded, text: TextSet) -> tuple[torch.Tensor, ...]:
    """Token ids of sentences from all over the text, as many as an analysis reads."""
    config = loaded.encoder.config
    lines = _lines(text)
    chosen = lines[:: max(1, len(lines) // _MAX_SENTENCES)][:_MAX_SENTENCES]
    ids: list[torch.Tensor] = []
    left = analysis_tokens(config)
    most = min(_MAX_SENTENCE_TOKENS, config.context_tokens)
    for found in encode_texts(loaded.tokenizer.tokenizer_json, chosen, most):
        if left <= 0:
            break
        left -= len(found)
        ids.append(torch.tensor(found, dtype=torch.int64))
    return tuple(ids)


def _lines(text: TextSet) -> list[str]:
    lines = (line.strip() for document in text.documents for line in document.splitlines())
    return [line for line in lines if line]


def _token_texts(loaded: Loaded) -> Texts:
    checkpoint, files, options = loaded.decoder, loaded.tokenizer, loaded.options
    tokenizer = open_tokenizer(files.tokenizer_json)
    prefix = [files.bos_token_id] if files.add_bos and files.bos_token_id is not None else []
    calibration = _calibration_text(options)
    quality = _quality_text(options)
    budget = int(_CALIBRATION_WORK / checkpoint.parameters)
    limit = checkpoint.config.context_tokens
    batches = to_token_batches(
        calibration,
        tokenizer,
        prefix,
        max_tokens=max(_MIN_CALIBRATION_TOKENS, min(_MAX_CALIBRATION_TOKENS, budget)),
        sequence_tokens=min(_SEQUENCE_TOKENS, limit),
    )
    context = options.context_tokens or loaded.board.export.context_tokens
    checks = to_token_batches(
        quality,
        tokenizer,
        prefix,
        max_tokens=_MAX_QUALITY_TOKENS,
        sequence_tokens=max(2, min(_SEQUENCE_TOKENS, limit, context)),
    )
    return Texts(batches, calibration.sha256, checks)


def _calibration_text(options: ExportOptions) -> TextSet:
    return calibration_text() if options.calibration is None else read_text_set(options.calibration)


def _quality_text(options: ExportOptions) -> TextSet:
    return probe_text() if options.quality_text is None else read_text_set(options.quality_text)


_CHECK: Final[Mapping[ModelKind, Callable[[Loaded], tuple[int, Texts]]]] = MappingProxyType(
    {"decoder": _decoder, "encoder": _encoder}
)
