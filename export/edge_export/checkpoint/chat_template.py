"""Tries a checkpoint's chat template with the device's engine before a bundle carries it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable
from datetime import datetime
from typing import Final

from edge_export.checkpoint.tokenizer_files import TokenizerFiles, open_tokenizer
from edge_reasoner.contract.template.trial import SINGLE_TURN, TemplateTrial, try_template
from edge_reasoner.errors import CheckpointError, TemplateError

_REMEDY = (
    "the device could not use the model in a chat; mend the template (chat_template.jinja in a directory, "
    "tokenizer.chat_template in a GGUF file), or take it out to export a model without one"
)


#: how families write the borders of a turn
_MARKER: Final = re.compile(
    r"<\|[A-Za-z0-9_]{1,40}\|>|<｜[^｜<>\s]{1,40}｜>|</?(?:start|end)_of_(?:turn|role)>"
)
_SHOWN: Final = 3


def check_chat_template_works(template: str, tokenizer: TokenizerFiles, where: str) -> tuple[str, ...]:
    """Warnings of conversations that the template does not take.

    Raises CheckpointError, naming the fault, for a template that cannot render a single question.
    """
    roles = {
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
        "pad_token": tokenizer.pad_token,
    }
    special = {role: text for role, text in roles.items() if text is not None}
    try:
        trial = try_template(template, special_tokens=special, clock=time.process_time, now=datetime.now)
    except TemplateError as error:
        raise CheckpointError(f"{where}: {error}; {_REMEDY}") from error
    for found in (trial.failed, trial.refused):
        if SINGLE_TURN in found:
            raise CheckpointError(f"{where}: {found[SINGLE_TURN]}; {_REMEDY}")
    if SINGLE_TURN in trial.lost:
        raise CheckpointError(f"{where}: the chat template leaves out the user's message; {_REMEDY}")
    return (*_warnings(trial, where), *_split_markers(template, tokenizer, where))


def _split_markers(template: str, tokenizer: TokenizerFiles, where: str) -> Iterable[str]:
    """Markers that the template writes and the tokenizer does not have: the model sees them as plain text."""
    written = dict.fromkeys(_MARKER.findall(template))
    if not written:
        return
    parsed = open_tokenizer(tokenizer.tokenizer_json)
    split = [text for text in written if parsed.token_to_id(text) is None]
    if split:
        shown = ", ".join(repr(text) for text in split[:_SHOWN])
        yield (
            f"{where}: the chat template writes {shown}, which is no token of the model and is read as plain "
            "text: does the template belong to it?"
        )


def _warnings(trial: TemplateTrial, where: str) -> Iterable[str]:
    for shape, problem in trial.failed.items():
        yield f"{where}: {problem}: the device refuses conversations with {shape}"
    for shape, problem in trial.refused.items():
        yield f"{where}: the chat template takes no conversation with {shape} ({problem})"
    if trial.lost:
        shapes = ", ".join(trial.lost)
        yield f"{where}: the chat template leaves texts out of conversations with {shapes}"
