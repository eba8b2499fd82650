"""Printing: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from edge_reasoner.errors import one_line, printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

    from edge_reasoner.query.answer import Answer, Piece

json_option = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object.")

thinking_option = click.option(
    "--show-thinking",
    is_flag=True,
    help="Show what a reasoning model thinks, dimmed, on standard error; --json has it anyway.",
)

#: longest line on standard error; a cloud's or a file's text may be in it
MAX_LINE_CHARS = 4000


def print_json(document: Mapping[str, Any]) -> None:
    """Prints one JSON object on one line, escaped to ASCII: no locale can lose a character of it."""
    click.echo(json.dumps(document, allow_nan=False))


def write_text(text: str) -> None:
    """Writes a piece of an answer at once, made `printable`: model text is untrusted, the cloud's more so.

    Also into a pipe, which may end at a terminal; `--json` keeps every character.
    """
    click.echo(printable(text), nl=False)


class AnswerWriter:
    """Writes a streamed answer: its text to standard output, at its end a line about it to standard error.

    `show_thinking`: what the model thinks goes to standard error too, dimmed where that is a terminal.
    """

    def __init__(self, *, show_thinking: bool) -> None:
        self._show_thinking = show_thinking
        self._thinking = False

    def write(self, piece: Piece) -> None:
        """Writes a piece at once."""
        if self._show_thinking and piece.thought:
            click.secho(printable(piece.thought), dim=True, nl=False, err=True)
            self._thinking = True
        if self._thinking and (piece or piece.kind in ("handover", "end")):
            click.echo(err=True)
            self._thinking = False
        write_text(piece)
        if piece.answer is not None:
            click.echo()
            note(footer(piece.answer))


def note(text: str) -> None:
    """One line on standard error, if anybody listens there."""
    with suppress(OSError):
        click.echo(one_line(text, MAX_LINE_CHARS), err=True)


def plain(text: object) -> str:
    """Text for a `console` or one of its table cells: printable, and no markup to it."""
    from rich.markup import escape

    return escape(printable(str(text)))


def console(*, stderr: bool = False) -> Console:
    """rich on standard output, or on standard error. What it prints is markup: see `plain`."""
    from rich.console import Console

    return Console(stderr=stderr, emoji=False)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner on standard error while something takes its time; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    with console(stderr=True).status(plain(what)):
        yield


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A rich progress bar on standard error; silent where that is no terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors = console(stderr=True)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        yield progress


def footer(answer: Answer) -> str:
    """One line for people: where the answer came from, why, and what it took."""
    timings, usage = answer.timings, answer.usage
    parts = [f"{answer.source} · {answer.model}"]
    if answer.confidence is not None:
        parts.append(f"confidence {answer.confidence:.2f}")
    parts.append("; ".join(answer.decision.reasons) or f"route {answer.decision.route}")
    rate = "" if timings.decode_tps is None else f" at {timings.decode_tps:.1f}/s"
    parts.append(f"{usage.completion_tokens} tokens{rate}")
    parts.append(f"first {timings.ttft_ms:.0f} ms, total {timings.total_ms:.0f} ms")
    if answer.cost.usd:
        parts.append(f"${answer.cost.usd:.6f}")
    if answer.finish_reason not in ("stop", "length"):
        parts.append(f"ended by {answer.finish_reason}")
    if answer.note:
        parts.append(answer.note)
    return f"[{' · '.join(parts)}]"
