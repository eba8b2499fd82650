"""`edge-reasoner chat`: a conversation, line by line."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

import click

from edge_reasoner.cli.options import (
    MAX_PROMPT_BYTES,
    bundle_argument,
    check_text,
    cloud_options,
    context_option,
    decode_prompt,
    mode_option,
    open_reasoner,
    sampling_options,
    take_sampling,
    threads_option,
)
from edge_reasoner.cli.output import AnswerWriter, note, thinking_option
from edge_reasoner.errors import EdgeReasonerError, InputError


@click.command()
@bundle_argument
@cloud_options
@mode_option("auto", "local", "cloud", "offline")
@sampling_options
@click.option("--system", metavar="TEXT", help="The conversation's first message.")
@threads_option
@context_option
@thinking_option
def chat(bundle: str, mode: str, system: str | None, show_thinking: bool, **options: Any) -> None:
    """Talk with BUNDLE: one line is one turn; the end of input (Ctrl-D) or /quit ends it."""
    if system is not None:
        check_text(system, "--system")
    params = take_sampling(options)
    interactive = sys.stdin.isatty()
    with open_reasoner(bundle, mode=mode, options=options) as reasoner, reasoner.session(system) as session:
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() its line editing
            context = reasoner.context_tokens
            room = "" if context is None else f", {context} tokens of context"
            note(f"{reasoner.name or 'the cloud'}{room}; /quit or Ctrl-D ends")
        while (line := _read_line(interactive)) is not None:
            if line.strip() == "/quit":
                return
            if not line.strip():
                continue
            try:
                writer = AnswerWriter(show_thinking=show_thinking)
                for piece in session.stream(line, params=params):
                    writer.write(piece)
            except EdgeReasonerError as error:
                if not interactive:
                    raise
                note(f"edge-reasoner: {error}")


def _read_line(interactive: bool) -> str | None:
    """The next line without its end; None at the end of input. Raises InputError."""
    if interactive:
        try:
            return input("> ")
        except EOFError:
            return None
        except UnicodeDecodeError as error:
            raise InputError(f"standard input: not UTF-8 at byte {error.start}") from error
    data = sys.stdin.buffer.readline(MAX_PROMPT_BYTES + 1)
    return decode_prompt(data, "standard input").rstrip("\r\n") if data else None
