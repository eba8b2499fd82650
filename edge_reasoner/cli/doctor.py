"""`edge-reasoner doctor`: is this machine fit, and which kernels does a bundle use on it?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edge_reasoner.cli.options import open_bundle_given, open_machine, threads_option
from edge_reasoner.cli.output import console, json_option, plain, print_json, waiting
from edge_reasoner.errors import BackendError, VerificationError

if TYPE_CHECKING:
    from rich.console import Console

    from edge_reasoner.bench.doctor import KernelCheck
    from edge_reasoner.contract.bundle.open import Bundle
    from edge_reasoner.query.assemble import Machine


@click.command()
@click.argument("bundle", type=click.Path(), required=False)
@threads_option
@click.option("--retest", is_flag=True, help="Run the bundle's self-test even if its result is known.")
@json_option
def doctor(bundle: str | None, threads: int | None, retest: bool, as_json: bool) -> None:
    """Show this machine, its libraries and, for BUNDLE, the kernels that its self-test chose.

    Exit status 3 if no kernel reproduces the bundle's golden vectors, 1 if onnxruntime cannot be loaded.
    """
    import msgspec

    from edge_reasoner.bench.doctor import library_versions, machine_facts, warnings_of
    from edge_reasoner.machine.allowance import allowance
    from edge_reasoner.machine.isa import native_import_is_safe
    from edge_reasoner.machine.state import read_state

    machine = open_machine(threads)
    opened = None if bundle is None else open_bundle_given(bundle, machine)
    with waiting("examining …"):
        probe, state, allowed = native_import_is_safe(), read_state(), allowance()
        facts = machine_facts(state, machine.threads)
        # where the library would kill the process, no kernel is tried
        kernels = _kernels(opened, machine, retest) if opened is not None and probe.safe else []
    document = {
        "machine": facts,
        "allowance": msgspec.to_builtins(allowed) | {"reason": allowed.reason()},
        "versions": library_versions(),
        "import_probe": msgspec.to_builtins(probe),
        "bundle": None if opened is None else _bundle_part(opened, kernels),
        "cache_dir": None if machine.cache_dir is None else str(machine.cache_dir),
        "warnings": warnings_of(state, probe, facts, opened, kernels),
    }
    if as_json:
        print_json(document)
    else:
        _show(document)
    if not probe.safe:
        raise BackendError(probe.message)
    if problem := next((kernel.problem for kernel in kernels if kernel.problem), None):
        raise VerificationError(problem)


def _kernels(opened: Bundle, machine: Machine, retest: bool) -> list[KernelCheck]:
    from edge_reasoner.bench.doctor import check_kernels

    return check_kernels(opened, machine, fresh=retest)


def _bundle_part(opened: Bundle, kernels: list[KernelCheck]) -> dict[str, Any]:
    return {
        "path": str(opened.root),
        "bundle_id": opened.manifest.bundle_id,
        "model": opened.manifest.model,
        "profile": opened.manifest.profile,
        "components": [kernel.as_dict() for kernel in kernels],
    }


def _show(document: dict[str, Any]) -> None:
    from rich.table import Table

    out = console()
    table = Table("machine", "", show_header=False)
    for name, value in {**document["machine"], **document["versions"]}.items():
        text = ", ".join(value) if isinstance(value, list) else value
        if name.endswith("_bytes") and value is not None:
            name, text = name.removesuffix("_bytes"), f"{value / 1e9:.2f} GB"
        table.add_row(name.replace("_", " "), "–" if text is None else plain(text))
    table.add_row("allowed", plain(_allowed(document["allowance"])))
    out.print(table)
    if document["bundle"] is not None:
        show_kernels(document["bundle"]["components"], out)
    for warning in document["warnings"]:
        out.print(f"warning: {plain(warning)}", style="yellow")
    if not document["warnings"]:
        out.print("nothing to complain about")


def _allowed(found: dict[str, Any]) -> str:
    memory = "" if found["memory_bytes"] is None else f", {found['memory_bytes'] / 1e9:.2f} GB"
    return f"{found['threads']} threads ({found['reason']}){memory}"


def show_kernels(components: list[dict[str, Any]], out: Console) -> None:
    """A table of every candidate that the self-test tried; the chosen one is marked."""
    from rich.table import Column, Table

    table = Table(
        "component", "variant", "options", Column("error", justify="right"),
        Column("ms/step", justify="right"), "result",
    )  # fmt: skip
    for part in components:
        for row in part["candidates"]:
            chosen = (row["variant_id"], row["session_options"]) == (part["variant"], part["session_options"])
            options = ", ".join(f"{key}={value}" for key, value in row["session_options"].items())
            table.add_row(
                plain(part["kind"]),
                plain(row["variant_id"]),
                plain(options or "as is"),
                "–" if row["error"] is None else f"{row['error']:.2g}",
                "–" if row["step_ms"] is None else f"{row['step_ms']:.2f}",
                f"{'chosen: ' if chosen else ''}{plain(row['reason'])}",
            )
        if part["problem"]:
            table.add_row(plain(part["kind"]), "–", "–", "–", "–", plain(part["problem"]))
    out.print(table)
