"""Tries a checkpoint's chat template with the device's engine before a bundle carries it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import datetime

from edge_export.checkpoint.tokenizer_files import TokenizerFiles
from edge_reasoner.contract.template.trial import SINGLE_TURN, TemplateTrial, try_template
from edge_reasoner.errors import CheckpointError, TemplateError

_REMEDY = (
    "the device could not use the model in a chat; mend the template (chat_template.jinja in a directory, "
    "tokenizer.chat_template in a GGUF file), or take it out to export a model without one"
)


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
    return tuple(_warnings(trial, where))


def _warnings(trial: TemplateTrial, where: str) -> Iterable[str]:
    for shape, problem in trial.failed.items():
        yield f"{where}: {problem}: the device refuses conversations with {shape}"
    for shape, problem in trial.refused.items():
        yield f"{where}: the chat template takes no conversation with {shape} ({problem})"
    if trial.lost:
        shapes = ", ".join(trial.lost)
        yield f"{where}: the chat template leaves texts out of conversations with {shapes}"
