"""`edge-reasoner eval`: how often a bundle is right."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_reasoner.cli.options import (
    bundle_argument,
    cloud_options,
    mode_option,
    open_bundle_given,
    open_machine,
    open_reasoner,
    threads_option,
)
from edge_reasoner.cli.output import console, json_option, plain, print_json, progress_bar, waiting
from edge_reasoner.errors import BundleError, InputError

if TYPE_CHECKING:
    from edge_reasoner.bench.eval import Result
    from edge_reasoner.bench.questions import Question
    from edge_reasoner.chat.params import SamplingParams
    from edge_reasoner.contract.bundle.open import Bundle
    from edge_reasoner.query.assemble import Machine


@click.command("eval")
@bundle_argument
@click.option(
    "--data",
    "data",
    required=True,
    metavar="FILE.jsonl",
    type=click.Path(path_type=Path),
    help="The questions.",
)
@click.option("--limit", type=int, help="Only the first N rows.")
@cloud_options
@mode_option("local", "auto", "cloud", default="local")
@click.option(
    "--metric",
    type=click.Choice(("auto", "choice", "number", "exact")),
    default="auto",
    show_default=True,
    help="auto: choice for rows with choices, number for numeric answers, else exact.",
)
@click.option("--max-tokens", type=int, default=256, show_default=True, help="Longest generated answer.")
@threads_option
@json_option
def eval_command(
    bundle: str,
    data: Path,
    limit: int | None,
    mode: str,
    metric: str,
    max_tokens: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Score BUNDLE on questions with known answers.

    Rows: {"question", "choices": […], "answer": index}, scored locally by length-normalized log-likelihood
    of the choices (modes auto and cloud ask for the letter); or {"question", "answer": "…"}: generated, and
    compared by the last number or as a whole.
    """
    from edge_reasoner.bench.eval import summarize
    from edge_reasoner.bench.questions import read_questions
    from edge_reasoner.chat.params import SamplingParams

    if limit is not None and limit < 1:
        raise InputError(f"--limit: {limit} is not allowed; give 1 or more")
    params = SamplingParams(max_tokens=max_tokens)
    questions = read_questions(data, metric=metric, limit=limit)
    machine = open_machine(options["threads"])
    start_s = time.monotonic()
    with waiting(f"checking {bundle} …"):
        opened = _opened(bundle, machine, mode)
    results = _results(opened or bundle, machine, questions, mode, params, options)
    document = {
        **summarize(results),
        "mode": mode,
        "model": None if opened is None else opened.manifest.model,
        "bundle_id": None if opened is None else opened.manifest.bundle_id,
        "data": str(data),
        "seconds": time.monotonic() - start_s,
    }
    if as_json:
        print_json(document)
    else:
        _show(document)


def _opened(bundle: str, machine: Machine, mode: str) -> Bundle | None:
    """The bundle; None where it cannot be opened and mode "cloud" asks nothing of it. Raises BundleError."""
    try:
        return open_bundle_given(bundle, machine)
    except BundleError:
        if mode != "cloud":
            raise
        return None


def _results(
    opened: Bundle | str,
    machine: Machine,
    questions: list[Question],
    mode: str,
    params: SamplingParams,
    options: dict[str, Any],
) -> list[Result]:
    """Scored choices first, then generated answers: one session at a time."""
    from edge_reasoner.bench.eval import ask_questions, score_choices

    scored = [question for question in questions if question.choices and mode == "local"]
    asked = [question for question in questions if not (question.choices and mode == "local")]
    results: list[Result] = []
    with progress_bar() as progress:
        task = progress.add_task("scoring", total=len(questions))
        if scored:
            assert not isinstance(opened, str), "mode local opens the bundle"
            results += score_choices(opened, machine, scored, lambda: progress.advance(task))
        if asked:
            with open_reasoner(opened, mode=mode, options=options) as reasoner:
                results += ask_questions(reasoner, asked, params, lambda: progress.advance(task))
    return results


def _show(document: dict[str, Any]) -> None:
    from rich.table import Column, Table

    stderr = "" if document["stderr"] is None else f" ± {100 * document['stderr']:.1f}"
    model = plain(document["model"] or "the cloud")
    title = f"{model}: {100 * document['accuracy']:.1f}{stderr} % of {document['n']}"
    table = Table("part", Column("n", justify="right"), Column("right %", justify="right"), title=title)
    for kind in ("by_metric", "by_source"):
        for name, part in document[kind].items():
            table.add_row(plain(f"{kind[3:]} {name}"), str(part["n"]), f"{100 * part['accuracy']:.1f}")
    out = console()
    out.print(table)
    if document["acc"] is not None:
        out.print(f"unnormalized {100 * document['acc']:.1f} %; headline: {document['normalization']}")
    usd = "unknown" if document["usd"] is None else f"{document['usd']:.6f}"
    out.print(f"escalated {100 * document['escalated_share']:.1f} %, US$ {usd}, {document['seconds']:.1f} s")
