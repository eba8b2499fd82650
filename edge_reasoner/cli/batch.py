"""`edge-reasoner batch`: a file of prompts in, a file of answers out."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from edge_reasoner.cli.options import (
    bundle_argument,
    cloud_options,
    context_option,
    mode_option,
    open_reasoner,
    sampling_options,
    take_sampling,
    threads_option,
)
from edge_reasoner.cli.output import json_option, note, print_json, progress_bar
from edge_reasoner.errors import InputError
from edge_reasoner.files import exists


@click.command()
@bundle_argument
@click.argument("source", metavar="IN.jsonl", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT.jsonl", type=click.Path(path_type=Path, dir_okay=False))
@cloud_options
@mode_option("auto", "local", "cloud", "offline")
@sampling_options
@threads_option
@context_option
@json_option
def batch(bundle: str, source: Path, target: Path, mode: str, as_json: bool, **options: Any) -> None:
    """Answer every row of IN.jsonl ({"prompt": …, "id": …}) and write OUT.jsonl.

    Each output row is what `ask --json` prints, with the row's id. Interrupted work resumes: finished rows
    wait in OUT.jsonl.partial, and the same command goes on from there. A prompt that cannot be answered
    gives a row {"id": …, "error": …} and, at the end, exit status 2.
    """
    from edge_reasoner.batch import read_batch, run_batch, run_name

    params = take_sampling(options)
    rows = read_batch(source)
    if exists(target) and target.samefile(source):
        raise InputError(f"{target}: is IN.jsonl itself; give the answers a file of their own")
    if not target.parent.is_dir():
        raise InputError(f"{target}: no such folder {str(target.parent)!r}")
    start_s = time.monotonic()
    with open_reasoner(bundle, mode=mode, options=options) as reasoner, progress_bar() as progress:
        # in mode cloud the bundle has no part in the answers
        bundle_id = "" if reasoner.activation is None else reasoner.activation.bundle_id
        other = {
            "mode": mode,
            **{key: options.get(key) for key in ("cloud_url", "cloud_model", "context_tokens")},
        }
        name = run_name(bundle_id, rows, params, other)
        task = progress.add_task("answering", total=len(rows))
        report = run_batch(
            reasoner,
            rows,
            target,
            name=name,
            params=params,
            advance=lambda done: progress.update(task, completed=done),
        )
    seconds = time.monotonic() - start_s
    if as_json:
        print_json({**asdict(report), "out": str(target), "seconds": seconds})
    else:
        sources = ", ".join(f"{count} {name}" for name, count in report.by_source.items())
        note(f"{target}: {report.rows} rows ({report.resumed} resumed; {sources}) in {seconds:.1f} s")
    if report.failed:
        raise InputError(f"{source}: {report.failed} of {report.rows} rows failed; {report.first_failure}")
