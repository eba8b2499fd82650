"""`edge-reasoner ask`: one question, one answer."""

from __future__ import annotations

import sys
from typing import Any

import click

from edge_reasoner.cli.options import (
    bundle_argument,
    check_text,
    cloud_options,
    context_option,
    mode_option,
    open_reasoner,
    read_standard_input,
    sampling_options,
    take_sampling,
    threads_option,
)
from edge_reasoner.cli.output import AnswerWriter, json_option, print_json, thinking_option


@click.command()
@bundle_argument
@click.argument("prompt", required=False)
@cloud_options
@mode_option("auto", "local", "cloud", "offline")
@sampling_options
@click.option("--system", metavar="TEXT", help="A system message before the prompt.")
@threads_option
@context_option
@thinking_option
@json_option
def ask(
    bundle: str,
    prompt: str | None,
    mode: str,
    system: str | None,
    show_thinking: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer PROMPT (or standard input: -) with BUNDLE.

    The answer goes to standard output as it is made; where it came from and why, to standard error.
    """
    messages = [] if system is None else [{"role": "system", "content": check_text(system, "--system")}]
    messages.append({"role": "user", "content": _prompt(prompt)})
    params = take_sampling(options)
    with open_reasoner(bundle, mode=mode, options=options) as reasoner:
        if as_json:
            print_json(reasoner.ask(messages, params=params).to_dict())
            return
        writer = AnswerWriter(show_thinking=show_thinking)
        for piece in reasoner.stream(messages, params=params):
            writer.write(piece)


def _prompt(prompt: str | None) -> str:
    if prompt is None and sys.stdin.isatty():
        raise click.UsageError("missing PROMPT; give a text, or - for standard input")
    if prompt is None or prompt == "-":
        return check_text(read_standard_input("standard input"), "standard input")
    return check_text(prompt, "PROMPT")
