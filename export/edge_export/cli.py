"""`edge-export`: one command from a checkpoint to a bundle for a named board."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as ProgressBar
from rich.table import Table

from edge_export.options import MAX_THREADS, TASKS, ExportOptions
from edge_export.plan.recipes import DEFAULT_RECIPE, RECIPES
from edge_export.plan.target import MIN_CONTEXT_TOKENS
from edge_export.progress import Progress
from edge_export.quantize import DEFAULT_QUANTIZER, QUANTIZERS, quantizer_names
from edge_reasoner._version import __version__
from edge_reasoner.errors import EdgeReasonerError, InputError, one_line, printable
from edge_reasoner.files import open_standard_streams
from edge_reasoner.machine.cache_dir import default_cache_dir
from edge_reasoner.machine.interrupts import Interrupts

DEBUG_VARIABLE = "EDGE_REASONER_DEBUG"
_MAX_LINE_CHARS = 4000


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.argument("model")
@click.option(
    "--profile",
    "profiles",
    multiple=True,
    required=True,
    metavar="NAME",
    help="Board to export for (`edge-reasoner profiles list`) or a profile's .toml; repeatable.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), help="Bundle directory; with several profiles, their parent."
)
@click.option("--task", type=click.Choice(TASKS), default="auto", show_default=True)
@click.option(
    "--recipe",
    type=click.Choice(list(RECIPES)),
    default=DEFAULT_RECIPE,
    show_default=True,
    help="; ".join(f"{row.name}: {row.summary}" for row in RECIPES.values()) + ".",
)
@click.option(
    "--format",
    type=click.Choice(["auto", "onnx"]),
    default="auto",
    show_default=True,
    expose_value=False,  # one lowering: both mean the same, and any other value is refused
    help="What graphs are written as; every board's is ONNX.",
)
@click.option(
    "--quantizer",
    type=click.Choice(quantizer_names()),
    default=DEFAULT_QUANTIZER,
    show_default=True,
    help="How codes are found. "
    + "; ".join(f"{name}: {row.summary}" for name, row in QUANTIZERS.items())
    + ".",
)
@click.option(
    "--context-tokens", type=click.IntRange(MIN_CONTEXT_TOKENS), help="KV cache size; default: the profile's."
)
@click.option("--calibration", type=click.Path(path_type=Path), help="Text (.txt, .jsonl) to calibrate on.")
@click.option(
    "--eval", "quality_text", type=click.Path(path_type=Path), help="Held-out text for the quality figures."
)
@click.option("--preprocessor", metavar="MODEL", help="Sentence encoder to put beside the model.")
@click.option(
    "--preprocessor-recipe",
    type=click.Choice(list(RECIPES)),
    default=DEFAULT_RECIPE,
    show_default=True,
    help="As --recipe, for the preprocessor.",
)
@click.option(
    "--max-size", "max_size_mb", type=click.FloatRange(0, min_open=True), help="Largest bundle, MB."
)
@click.option(
    "--max-latency",
    "max_latency_ms",
    type=click.FloatRange(0, min_open=True),
    help="Most predicted milliseconds for a decoded token (encoder: for a text).",
)
@click.option(
    "--min-quality", type=click.FloatRange(0, 1), help="Least top-1 agreement (encoder: mean cosine)."
)
@click.option("--licence", help="The model's licence, where the checkpoint does not name it.")
@click.option("--bundle-version", "version", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--threads",
    type=click.IntRange(1, MAX_THREADS),
    help="Threads to export with; default: what this process may use.",
)
@click.option(
    "--cache",
    metavar="DIR|off",
    help="Where results of stages are kept, so that an interrupted export, started again, resumes. "
    "Default: `export` in the user's cache folder.",
)
@click.option(
    "--debug", is_flag=True, help=f"Show tracebacks (also: {DEBUG_VARIABLE}=1).", expose_value=False
)
@click.option("--dry-run", is_flag=True, help="Print the plan and the predicted figures; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
@click.version_option(__version__, prog_name="edge-export")
def command(
    model: str, profiles: tuple[str, ...], out: Path | None, as_json: bool, threads: int | None,
    cache: str | None, **chosen: Any,
) -> None:  # fmt: skip
    """Export MODEL (a Hugging Face directory, a .gguf file or a hub id) for one or more boards."""
    from edge_reasoner.contract.profile import load_profile

    # Names are checked before torch is imported: a typing error costs no seconds.
    boards = [load_profile(name) for name in profiles]
    if len({board.name for board in boards}) != len(boards):
        raise InputError("--profile: the same board is named twice")
    reports = list(_export_all(model, boards, out, threads, _cache_folder(cache), chosen))
    if as_json:
        objects = [report.to_dict() for report in reports]
        click.echo(json.dumps(objects[0] if len(objects) == 1 else {"bundles": objects}))
    else:
        for report in reports:
            _print_report(report)


def _export_all(
    model: str, boards: list[Any], out: Path | None, threads: int | None, cache: Path | None,
    chosen: dict[str, Any],
) -> Iterator[Any]:  # fmt: skip
    # Spinning worker threads make a busy machine several times slower; read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = ExportOptions(**chosen) if threads is None else ExportOptions(threads=threads, **chosen)
    from edge_export.pipeline import export

    for board in boards:
        target = _target(model, board.name, out, len(boards))
        if len(boards) > 1 and not options.dry_run:
            _make_folder(target.parent)
        with _progress() as hook:
            report = export(model, board, target, options, hook, cache=cache)
        if report.reused:
            _say(f"reused from {cache}: {', '.join(report.reused)}")
        yield report


def _cache_folder(chosen: str | None) -> Path | None:
    """Where results are kept: as chosen, else in the user's cache folder; None for nowhere."""
    if chosen == "off":
        return None
    if chosen is not None:
        return Path(chosen)
    found = default_cache_dir(os.environ)
    return None if found is None else found / "export"


def _in_flags(message: str) -> str:
    """The library speaks of parameters (`max_size_mb=5: …`), the command of its flags (`--max-size 5: …`)."""
    flags = {parameter.name: parameter.opts[0] for parameter in command.params}
    return re.sub(
        r"\b([a-z_]+)=(?=\S)", lambda found: f"{flags[found[1]]} " if found[1] in flags else found[0], message
    )


def _target(model: str, board: str, out: Path | None, count: int) -> Path:
    if out is None:
        return Path(f"{Path(model).stem or 'model'}-{board}.bundle")
    return out if count == 1 else out / board


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: {folder} cannot be made: {error.strerror or error}") from error


@contextmanager
def _progress() -> Iterator[Progress]:
    """A progress bar on stderr, where that is a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with ProgressBar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("opening", total=None)

        def hook(what: str, done: int, total: int) -> None:
            bar.update(task, description=one_line(what), completed=done, total=total)

        yield hook


def _print_report(report: Any) -> None:
    console = Console(emoji=False)
    table = Table(show_header=False, box=None)
    facts: dict[str, Any] = {"profile": report.profile, "recipe": report.plan.get("recipe")}
    facts |= {name: f"{value / 1e6:.1f} MB" for name, value in report.sizes.items()}
    facts |= {name: f"{value:.4g}" for name, value in report.quality.items()}
    facts |= {
        f"predicted {name}": f"{value:.4g}" for name, value in report.predicted.items() if value is not None
    }
    if report.plan.get("units"):
        facts["formats"] = _formats(report.plan["units"])
    for name, value in facts.items():
        table.add_row(*(escape(printable(str(text))) for text in (name, value)))
    console.print(table)
    for note in report.plan.get("notes", ()):
        _say(f"note: {note}")
    for warning in report.warnings:
        _say(f"warning: {_in_flags(warning)}")
    if report.bundle is None:
        click.echo("dry run: nothing was written")
    else:
        click.echo(printable(f"{report.bundle} ({report.seconds:.0f} s)"))


def _say(text: str) -> None:
    """One line on standard error, if anybody listens there; names and messages of strangers are in it."""
    with suppress(OSError):
        click.echo(one_line(text, _MAX_LINE_CHARS), err=True)


def _formats(units: list[dict[str, Any]]) -> str:
    """How many weights are stored in which format."""
    counts: dict[str, int] = {}
    for unit in units:
        counts[unit["format"]] = counts.get(unit["format"], 0) + unit["parameters"]
    total = sum(counts.values())
    return ", ".join(f"{name} {100 * n / total:.0f} %" for name, n in sorted(counts.items()))


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status of the contract."""
    open_standard_streams()
    given = sys.argv[1:] if arguments is None else arguments
    with Interrupts() as interrupts:
        try:
            command.main(given, prog_name="edge-export", standalone_mode=False)
        except BaseException as error:  # noqa: BLE001 - the program's edge; what is unknown is raised again
            return _status(error, interrupts, _is_debug(given))
    return 0


def _status(error: BaseException, interrupts: Interrupts, debug: bool) -> int:
    """Says in one line what ended the program; its exit status."""
    if debug and isinstance(error, Exception) and not isinstance(error, click.exceptions.Exit):
        traceback.print_exception(error)
    if interrupts.seen is not None or isinstance(error, (KeyboardInterrupt, click.Abort)):
        signal_name = "" if interrupts.seen in (None, signal.SIGINT) else f" by {interrupts.seen.name}"
        _say(f"interrupted{signal_name}; nothing was written")
        return interrupts.exit_status
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, click.ClickException):
        _say(f"edge-export: {error.format_message()}")
        return 2
    if isinstance(error, EdgeReasonerError):
        _say(f"edge-export: {_in_flags(str(error))}")
        return error.exit_status
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        _say(f"edge-export: {where}{error.strerror or error}")
        return 1
    if not isinstance(error, Exception):
        raise error
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    _say(f"edge-export: unexpected {text} (--debug shows where)")
    return 1


def _is_debug(arguments: list[str]) -> bool:
    """Whether tracebacks are wanted: also where the arguments could not even be parsed."""
    return "--debug" in arguments or os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


if __name__ == "__main__":
    sys.exit(main())
