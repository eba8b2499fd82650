"""check: refuses what the board cannot take, in the first seconds; reads the texts to measure on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from tokenizers import Tokenizer

from edge_export.data.texts import TextSet, calibration_text, probe_text, read_text_set, to_token_batches
from edge_export.lower.encoder_onnx import encoder_contrib_ops
from edge_export.options import ExportOptions
from edge_export.plan.encoder_formats import encoder_formats
from edge_export.plan.plan import check_decoder, plan_decoder
from edge_export.quantize import BlockFormat
from edge_export.stages.costs import decoder_cost
from edge_export.stages.values import Checked, Loaded, ModelKind, Run, Texts, extend
from edge_reasoner.contract.profile import DeviceProfile
from edge_reasoner.contract.profile.cost import require_fit
from edge_reasoner.errors import TargetError

#: Calibration work grows with both: a larger model needs fewer tokens to show which inputs matter.
_CALIBRATION_WORK: Final = 6e11
_MAX_CALIBRATION_TOKENS, _MIN_CALIBRATION_TOKENS = 2048, 384
_MAX_QUALITY_TOKENS: Final = 1024
_SEQUENCE_TOKENS: Final = 512
_MAX_SENTENCES: Final = 256
#: `Shape` with bounds
_ENCODER_OPSET: Final = 15


def check(run: Run, loaded: Loaded) -> Checked:
    """Operators, shapes, memory and context. Raises TargetError, or InputError for options out of range."""
    context_tokens, texts = _CHECK[loaded.kind](loaded)
    return extend(Checked, loaded, context_tokens=context_tokens, texts=texts)


def _decoder(loaded: Loaded) -> tuple[int, Texts]:
    config, board, recipe = loaded.decoder.config, loaded.board, loaded.options.recipe
    context = check_decoder(config, board, recipe, loaded.options.context_tokens)  # type: ignore[arg-type]
    smallest = "int4" if recipe == "auto" else recipe
    plan = plan_decoder(config, board, smallest, context, None, None)  # type: ignore[arg-type]
    require_fit(decoder_cost(config, plan), board)
    return context, _token_texts(loaded)


def _encoder(loaded: Loaded) -> tuple[int, Texts]:
    config = loaded.encoder.config
    formats = encoder_formats(config, encoder_recipe(loaded.options.recipe))
    quantized = any(isinstance(fmt, BlockFormat) for fmt in formats.matrices.values())
    _require_operators(encoder_contrib_ops(quantized), loaded.board)
    lines = [line.strip() for text in _quality_text(loaded.options).documents for line in text.splitlines()]
    return config.context_tokens, Texts(sentences=tuple(filter(None, lines))[:_MAX_SENTENCES])


def encoder_recipe(recipe: str) -> str:
    """`auto` for an encoder."""
    return "int8" if recipe == "auto" else recipe


def _require_operators(needed: frozenset[str], board: DeviceProfile) -> None:
    allowed = board.allowed_ops
    if allowed is not None and (lacking := sorted(needed - allowed)):
        raise TargetError(
            f"profile {board.name!r}: its onnxruntime lacks {', '.join(lacking)}, which an encoder needs"
        )
    if board.max_opset < _ENCODER_OPSET:
        raise TargetError(
            f"profile {board.name!r}: export_opset {board.max_opset}; an encoder needs {_ENCODER_OPSET}"
        )


def _token_texts(loaded: Loaded) -> Texts:
    checkpoint, files, options = loaded.decoder, loaded.tokenizer, loaded.options
    tokenizer = Tokenizer.from_str(files.tokenizer_json.decode("utf-8"))
    prefix = [files.bos_token_id] if files.add_bos and files.bos_token_id is not None else []
    calibration = calibration_text() if options.calibration is None else read_text_set(options.calibration)
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


def _quality_text(options: ExportOptions) -> TextSet:
    return probe_text() if options.quality_text is None else read_text_set(options.quality_text)


_CHECK: Final[Mapping[ModelKind, Callable[[Loaded], tuple[int, Texts]]]] = MappingProxyType(
    {"decoder": _decoder, "encoder": _encoder}
)
