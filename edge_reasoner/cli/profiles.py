"""`edge-reasoner profiles list | show NAME | validate FILE | probe`: the boards and the machine at hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Column, Table

from edge_reasoner.cli.output import console, json_option, note, plain, print_json
from edge_reasoner.contract.profile.load import (
    dump_profile_toml,
    list_profiles,
    load_profile,
    parse_profile,
    profile_sha256,
)
from edge_reasoner.contract.profile.schema import DeviceProfile, Figure, Runtime
from edge_reasoner.errors import InputError, printable
from edge_reasoner.files import write_atomically
from edge_reasoner.machine.state import MachineState, read_state


@click.group()
def profiles() -> None:
    """Device profiles: the boards we know, and the machine at hand."""


@profiles.command("list")
@json_option
def list_command(as_json: bool) -> None:
    """List the built-in profiles."""
    known = [load_profile(name) for name in list_profiles()]
    if as_json:
        print_json({"profiles": [_summary(profile) for profile in known]})
        return
    table = Table(Column("name", no_wrap=True), "board", "memory", "decode GB/s", "accelerators")
    for profile in known:
        table.add_row(
            plain(profile.name),
            plain(profile.title),
            f"{profile.memory.capacity_gib.value:g} GiB",
            f"{profile.memory.effective_decode_gbps.value:g}",
            plain(", ".join(a.name for a in profile.accelerators) or "–"),
        )
    console().print(table)


@profiles.command("show")
@click.argument("name")
@json_option
def show_command(name: str, as_json: bool) -> None:
    """Show one profile: a built-in NAME, or the path of a .toml file."""
    profile = load_profile(name)
    if as_json:
        print_json(_document(profile))
        return
    _show(profile, console())


@profiles.command("validate")
@click.argument("file", type=click.Path(path_type=Path))
@json_option
def validate_command(file: Path, as_json: bool) -> None:
    """Check a profile FILE; one clear line and exit status 2 if it is malformed."""
    profile = load_profile(file)
    if as_json:
        print_json({"valid": True, "name": profile.name, "sha256": profile_sha256(profile)})
        return
    click.echo(printable(f"{file}: valid profile {profile.name!r}"))


@profiles.command("probe")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the profile there (TOML)."
)
@click.option("--name", help="The profile's name. Default: the stem of --out, else this-machine.")
@json_option
def probe_command(out: Path | None, name: str | None, as_json: bool) -> None:
    """Measure this machine (about three seconds) and write a profile of it."""
    from edge_reasoner.machine.probe import probe_machine  # numpy: not for `list` and `show`

    name = name or (out.stem.lower() if out else "this-machine")
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,63}", name):
        raise InputError(f"profile name {name!r}: allowed are a-z, 0-9 and -, at most 64, not - first")
    profile = probe_machine(name=name, progress=note)
    state = read_state()
    if out is not None:
        text = dump_profile_toml(profile)
        parse_profile(text.encode(), str(out))
        try:
            write_atomically(out, text.encode())
        except OSError as error:
            raise InputError(f"{out}: cannot write: {error.strerror or error}") from error
    if as_json:
        written = str(out) if out is not None else None
        print_json({**_document(profile), "state": msgspec.to_builtins(state), "written": written})
        return
    screen = console()
    _show(profile, screen)
    _show_state(state, screen)
    screen.print(plain(f"written to {out}" if out else "Not written; use --out FILE.toml."))


def _document(profile: DeviceProfile) -> dict[str, Any]:
    return {
        "profile": msgspec.to_builtins(profile),
        "derived": {
            "big_cores": profile.big_cores,
            "default_threads": profile.default_threads,
            "memory_budget_bytes": profile.memory_budget_bytes,
            "max_opset": profile.max_opset if profile.runtime("onnxruntime") else None,
        },
        "sha256": profile_sha256(profile),
    }


def _summary(profile: DeviceProfile) -> dict[str, Any]:
    return {
        "name": profile.name,
        "title": profile.title,
        "summary": profile.summary,
        "architecture": profile.architecture,
        "memory_gib": profile.memory.capacity_gib.value,
        "effective_decode_gbps": profile.memory.effective_decode_gbps.value,
        "accelerators": [a.name for a in profile.accelerators],
    }


def _cores(profile: DeviceProfile) -> str:
    return " + ".join(
        f"{c.cores} × {c.microarchitecture} @ {c.clock_ghz.value:g} GHz" for c in profile.clusters
    )


def _figures(profile: DeviceProfile) -> list[tuple[str, Figure]]:
    """Every figure of the profile with its dotted field name, in file order."""
    found: list[tuple[str, Figure]] = []

    def walk(record: msgspec.Struct, prefix: str) -> None:
        for field in record.__struct_fields__:
            value = getattr(record, field)
            if isinstance(value, Figure):
                found.append((prefix + field, value))
            elif isinstance(value, msgspec.Struct):
                walk(value, f"{prefix}{field}.")
            elif isinstance(value, tuple):
                for item in value:
                    if isinstance(item, msgspec.Struct):
                        label = getattr(item, "name", None) or getattr(item, "microarchitecture", "")
                        walk(item, f"{prefix}{field}[{label}].")

    walk(profile, "")
    return found


def _show(profile: DeviceProfile, out: Console) -> None:
    out.print(plain(f"{profile.name}: {profile.title}"), style="bold")
    out.print(plain(profile.summary))
    out.print(plain(f"CPU: {_cores(profile)}; {' '.join(sorted(profile.isa)) or 'features unknown'}"))
    table = Table(Column("figure", overflow="fold"), "value", "basis", "source")
    for field, figure in _figures(profile):
        table.add_row(plain(field), f"{figure.value:g}", figure.basis, plain(figure.source))
    out.print(table)
    runtimes = Table("runtime", "newest", "Python", "opset", "providers, preferred first")
    for entry in profile.runtimes:
        providers = ", ".join(entry.execution_providers)
        cells = (entry.backend, entry.newest_version, entry.python, _opset(entry), providers)
        runtimes.add_row(*map(plain, cells))
    out.print(runtimes)
    for listing in (_accelerators(profile), _precisions(profile), _limits(profile), _modes(profile)):
        if listing.row_count:
            out.print(listing)
    out.print(
        plain(
            f"A model may take {profile.memory_budget_bytes / 1e6:.0f} MB;"
            f" {profile.default_threads} threads; context {profile.export.context_tokens} tokens."
        )
    )


def _accelerators(profile: DeviceProfile) -> Table:
    table = Table("accelerator", "kind", "precisions", "decoder LMs", "driven by")
    for entry in profile.accelerators:
        runs = "yes" if entry.runs_decoder_lm else "no"
        cells = (entry.name, entry.kind, ", ".join(entry.precisions), runs, entry.runtime)
        table.add_row(*map(plain, cells))
    return table


def _precisions(profile: DeviceProfile) -> Table:
    table = Table("task", "on", "weights that run")
    for row in profile.precisions:
        table.add_row(*map(plain, (row.task, row.processor, ", ".join(row.weights))))
    return table


def _limits(profile: DeviceProfile) -> Table:
    table = Table("cannot", "why", "instead")
    for limit in profile.cannot:
        table.add_row(plain(limit.what), plain(limit.why), plain(limit.instead))
    return table


def _modes(profile: DeviceProfile) -> Table:
    table = Table("power mode", "limit", "clocks")
    for mode in profile.power.modes:
        default = " (default)" if mode.name == profile.power.default_mode else ""
        limit = "–" if mode.limit_w is None else f"{mode.limit_w.value:g} W"
        table.add_row(plain(mode.name) + default, limit, plain(mode.clock_notes))
    return table


def _opset(entry: Runtime) -> str:
    if entry.export_opset is None:
        return "–"
    return f"{entry.export_opset} (accepts {entry.accepted_opset})"


def _show_state(state: MachineState, out: Console) -> None:
    hot = "–"
    if state.temperature_c is not None:
        hot = f"{state.temperature_c:.0f} °C ({state.temperature_zone})"
    throttling = "–" if state.throttling is None else ", ".join(state.throttling) or "none"
    out.print(
        plain(
            f"Now: temperature {hot}; governor {state.governor or '–'};"
            f" power mode {state.power_mode or '–'}; throttling {throttling};"
            f" onnxruntime {state.onnxruntime_version or 'not installed'}"
        )
    )
