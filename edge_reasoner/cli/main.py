"""`edge-reasoner`: finds the command, runs it, and turns every error into one line and an exit status.

0 done · 1 anything else · 2 bad usage or input · 3 a check failed · 4 cloud unavailable · 128 and its number
for a signal that ended it: 130 Ctrl-C, 143 SIGTERM, 129 a closed terminal.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

import click

from edge_reasoner._version import __version__
from edge_reasoner.cli.output import note
from edge_reasoner.errors import EdgeReasonerError
from edge_reasoner.files import open_standard_streams
from edge_reasoner.machine.interrupts import Interrupts

DEBUG_VARIABLE = "EDGE_REASONER_DEBUG"

#: command → where it is; imported only when it is named (or for its line in --help)
COMMAND_TABLE = {
    "ask": "edge_reasoner.cli.ask:ask",
    "batch": "edge_reasoner.cli.batch:batch",
    "bench": "edge_reasoner.cli.bench:bench",
    "bundle": "edge_reasoner.cli.bundle:bundle",
    "chat": "edge_reasoner.cli.chat:chat",
    "cloud": "edge_reasoner.cli.cloud:cloud",
    "doctor": "edge_reasoner.cli.doctor:doctor",
    "eval": "edge_reasoner.cli.eval:eval_command",
    "profiles": "edge_reasoner.cli.profiles:profiles",
}


@dataclass
class Settings:
    """What the group's own options say."""

    debug: bool


class LazyGroup(click.Group):
    """A group whose commands are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands."""
        return sorted(COMMAND_TABLE)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in COMMAND_TABLE:
            return None
        module, _, attribute = COMMAND_TABLE[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def invoke(self, ctx: click.Context) -> object:
        """As click does; an error of the library speaks of the command's flags from here on."""
        try:
            return super().invoke(ctx)
        except EdgeReasonerError as error:
            name = ctx.invoked_subcommand
            command = None if name is None else self.get_command(ctx, name)
            if command is not None and (text := in_flags(str(error), command)) != str(error):
                raise type(error)(text) from error
            raise

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, but an unknown name's error lists the commands there are."""
        if args and not args[0].startswith("-") and args[0] not in COMMAND_TABLE:
            raise click.UsageError(
                f"no such command {args[0]!r}; there are: {', '.join(sorted(COMMAND_TABLE))}", ctx
            )
        return super().resolve_command(ctx, args)


@click.command(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="edge-reasoner")
@click.option("--debug", is_flag=True, help=f"Show tracebacks (also: {DEBUG_VARIABLE}=1).")
@click.pass_obj
def cli(settings: Settings | None, debug: bool) -> None:
    """Run an exported reasoning model on this device; ask the cloud where a gate says so."""
    if settings is not None:
        settings.debug = settings.debug or debug


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line (default: this process's arguments) and returns its exit status."""
    settings = Settings(debug=os.environ.get(DEBUG_VARIABLE, "") not in ("", "0"))
    open_standard_streams()
    _encode_anything()
    with Interrupts() as interrupts:
        status = _run(arguments, settings, interrupts)
    if interrupts.seen is not None and interrupts.seen != signal.SIGINT:
        note(f"edge-reasoner: ended by {interrupts.seen.name}")
    return status if interrupts.seen is None else interrupts.exit_status


def _run(arguments: Sequence[str] | None, settings: Settings, interrupts: Interrupts) -> int:
    try:
        outcome = cli.main(
            args=list(arguments) if arguments is not None else None,
            prog_name="edge-reasoner",
            standalone_mode=False,
            obj=settings,
        )
        sys.stdout.flush()
        return outcome if isinstance(outcome, int) else 0
    except (KeyboardInterrupt, click.Abort):
        return interrupts.exit_status
    except Exception as error:  # noqa: BLE001 - the edge: what nobody foresaw is still one line
        # an interruption may have become another error on its way up, which nobody needs to read
        return _status(error, settings) if interrupts.seen is None else interrupts.exit_status


def _status(error: Exception, settings: Settings) -> int:
    """Says in one line what ended the command."""
    if isinstance(error, BrokenPipeError):
        return _close_quietly()
    if isinstance(error, click.ClickException):
        return _fail(_usage(error), error.exit_code, settings)
    if isinstance(error, EdgeReasonerError):
        return _fail(str(error), error.exit_status, settings)
    return _fail(_unforeseen(error), 1, settings)


def in_flags(message: str, command: click.Command) -> str:
    """The library speaks of parameters (`new_tokens=0 …`), a command of its flags (`--new-tokens 0 …`)."""
    names = {parameter.name: parameter.opts[0] for parameter in command.params if parameter.opts}
    flags = {name: flag for name, flag in names.items() if flag.startswith("--")}
    return re.sub(
        r"\b([a-z_]+)=(?=\S)", lambda found: f"{flags[found[1]]} " if found[1] in flags else found[0], message
    )


def _usage(error: click.ClickException) -> str:
    context = getattr(error, "ctx", None)
    hint = f" (see {context.command_path} --help)" if context is not None else ""
    return f"{error.format_message()}{hint}"


def _unforeseen(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}"
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"unexpected {text} (--debug before the command shows where)"


def _fail(message: str, status: int, settings: Settings) -> int:
    if settings.debug:
        traceback.print_exc()
    note(f"edge-reasoner: {message}")
    return status


def _close_quietly() -> int:
    """The reader went away (`… | head`): nothing is left to say, at exit neither."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _encode_anything() -> None:
    """A terminal without Unicode shows what it can instead of failing in mid-answer."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
