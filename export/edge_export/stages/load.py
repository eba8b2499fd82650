"""load: opens the checkpoint and its tokenizer; weights stay on the disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

from edge_export.checkpoint.bert import EncoderCheckpoint, load_encoder
from edge_export.checkpoint.chat_template import check_chat_template_works
from edge_export.checkpoint.load import DecoderCheckpoint, load_checkpoint
from edge_export.checkpoint.tokenizer_files import TokenizerFiles
from edge_export.stages.values import Found, Loaded, ModelKind, Run, extend

#: what the device's template sandbox accepts; a longer template is left out with a warning
MAX_TEMPLATE_BYTES: Final = 256 * 1024

_Opened = tuple[DecoderCheckpoint | EncoderCheckpoint, TokenizerFiles, str | None]


def load(run: Run, found: Found) -> Loaded:
    """Headers and configuration, all of them checked. Raises CheckpointError."""
    checkpoint, tokenizer, template = _LOAD[found.kind](found.path)
    warnings = (*checkpoint.warnings, *tokenizer.warnings)
    if template is not None and len(template.encode()) > MAX_TEMPLATE_BYTES:
        warnings = (
            *warnings,
            f"the chat template exceeds {MAX_TEMPLATE_BYTES} bytes and was left out",
        )
        template = None
    if isinstance(checkpoint, DecoderCheckpoint) and not (
        checkpoint.config.eos_token_ids or tokenizer.eos_token_ids
    ):
        warnings = (
            *warnings,
            f"{found.path}: names no token that ends a text (eos_token_id): answers end at max_tokens only",
        )
    if template is not None:
        warnings = (*warnings, *check_chat_template_works(template, tokenizer, str(found.path)))
    return extend(
        Loaded,
        found,
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        chat_template=template,
        warnings=warnings,
    )


def _decoder(path: Path) -> _Opened:
    checkpoint = load_checkpoint(path)
    return checkpoint, checkpoint.tokenizer, checkpoint.chat_template or checkpoint.tokenizer.chat_template


def _encoder(path: Path) -> _Opened:
    checkpoint = load_encoder(path)
    return checkpoint, checkpoint.tokenizer, None


_LOAD: Final[Mapping[ModelKind, Callable[[Path], _Opened]]] = MappingProxyType(
    {"decoder": _decoder, "encoder": _encoder}
)
