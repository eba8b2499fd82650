"""find: where the model is, and of which kind."""

from __future__ import annotations

from edge_export.checkpoint.hub import resolve_model
from edge_export.checkpoint.load import detect, find_model
from edge_export.stages.values import Found, Job, Run, extend
from edge_reasoner.errors import InputError

_TASKS = {"causal-lm": "decoder", "encoder": "encoder"}


def find(run: Run, job: Job) -> Found:
    """Resolves a path or hub id. Raises CheckpointError; InputError where the model is not what was said."""
    path = find_model(resolve_model(job.model))
    kind, task = detect(path), job.options.task
    if task != "auto" and _TASKS[task] != kind:
        raise InputError(f"{job.model}: task={task!r}, but the model is {_article(kind)}")
    if kind == "encoder" and job.options.preprocessor is not None:
        raise InputError(
            f"preprocessor={job.options.preprocessor!r}: only a causal LM has one; {job.model} is an encoder"
        )
    return extend(Found, job, path=path, kind=kind)


def _article(kind: str) -> str:
    return "an encoder" if kind == "encoder" else "a causal LM"
