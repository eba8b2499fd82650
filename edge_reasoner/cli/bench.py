"""`edge-reasoner bench`: how fast a bundle is on this machine, and how much of it that uses."""

from __future__ import annotations

from typing import Any

import click

from edge_reasoner.cli.options import bundle_argument, open_bundle_given, open_machine, threads_option
from edge_reasoner.cli.output import console, json_option, plain, print_json
from edge_reasoner.errors import InputError

_ROWS = (
    ("load_ms", "open a bundle, hashes checked", "ms"),
    ("cold_first_token_ms", "process start to first token", "ms"),
    ("ttft_ms", "warm first token", "ms"),
    ("prefill_tps", "prefill", "tokens/s"),
    ("decode_tps", "decode", "tokens/s"),
    ("peak_rss_mb", "peak memory of a fresh process", "MB"),
    ("effective_gbps", "weights and KV streamed", "GB/s"),
    ("machine_gbps", "this machine reads", "GB/s"),
)

#: taken for a machine that does not tell
_LITTLE_MEMORY_BYTES = 1 << 30


@click.command()
@bundle_argument
@click.option("--prompt-tokens", type=int, default=512, show_default=True, help="Tokens of each prompt.")
@click.option("--new-tokens", type=int, default=128, show_default=True, help="Tokens of each answer.")
@click.option("--concurrency", type=int, default=1, show_default=True, help="Answers at a time: only 1.")
@click.option(
    "--repeat",
    "repeats",
    type=int,
    default=5,
    show_default=True,
    help="Measured runs; one more is discarded.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Draws the prompts' tokens.")
@threads_option
@json_option
def bench(
    bundle: str,
    prompt_tokens: int,
    new_tokens: int,
    concurrency: int,
    repeats: int,
    seed: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """Measure BUNDLE on this machine: medians over --repeat runs of random prompts."""
    from edge_reasoner.bench.bench import BenchOptions
    from edge_reasoner.bench.bench import bench as measure

    if seed < 0:
        raise InputError(f"--seed: {seed} is not allowed; give 0 or more")
    options = BenchOptions(prompt_tokens, new_tokens, repeats, concurrency, seed)
    machine = open_machine(threads)
    opened = open_bundle_given(bundle, machine)
    with console(stderr=True).status("measuring …") as status:
        report = measure(
            opened,
            machine,
            options,
            machine_gbps=lambda: _read_gbps(machine.threads),
            advance=lambda what: status.update(f"measuring: {what} …"),
        )
    if as_json:
        print_json(report)
        return
    _show(report)


def _read_gbps(threads: int) -> float:
    from edge_reasoner.machine.memory import total_bytes
    from edge_reasoner.machine.probe import measure_speed

    return measure_speed(threads, total_bytes() or _LITTLE_MEMORY_BYTES, seconds=0.4).read_gbps


def _show(report: dict[str, Any]) -> None:
    from rich.table import Column, Table

    title = (
        f"{plain(report['model'])} · {plain(report['variant'])} · {report['threads']} threads ·"
        f" {report['prompt_tokens']} + {report['new_tokens']} tokens · median of {report['repeats']}"
    )
    table = Table("figure", Column("value", justify="right"), "unit", title=title)
    for name, label, unit in _ROWS:
        value = report[name]
        table.add_row(label, "–" if value is None else f"{value:,.1f}", unit)
    table.add_row("graph and weights", f"{report['weight_bytes'] / 1e6:,.1f}", "MB")
    console().print(table)
