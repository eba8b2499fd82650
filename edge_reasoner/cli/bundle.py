"""`edge-reasoner bundle`: what a bundle holds, whether it is what it says, and its way into one file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edge_reasoner.cli.options import bundle_argument, open_bundle_given, open_machine, threads_option
from edge_reasoner.cli.output import console, json_option, note, plain, print_json, waiting
from edge_reasoner.errors import VerificationError

if TYPE_CHECKING:
    from edge_reasoner.contract.bundle.open import Bundle
    from edge_reasoner.query.assemble import Machine

_component_option = click.option("--component", metavar="KIND", help="Only this component (reasoner, …).")


@click.group()
def bundle() -> None:
    """Look into a bundle, check it, pack it."""


@bundle.command()
@bundle_argument
@_component_option
@json_option
def inspect(bundle: str, component: str | None, as_json: bool) -> None:
    """Show what BUNDLE's manifest says. File hashes are not computed: see verify."""

    opened = open_bundle_given(bundle, open_machine(None), "sizes")
    document = _document(opened, component)
    if as_json:
        print_json(document)
    else:
        _show(document)


@bundle.command()
@bundle_argument
@_component_option
@click.option("--no-run", is_flag=True, help="Check hashes only; do not run the golden vectors.")
@threads_option
@json_option
def verify(bundle: str, component: str | None, no_run: bool, threads: int | None, as_json: bool) -> None:
    """Check every hash of BUNDLE and reproduce its golden vectors on this machine.

    Exit status 2 if the bundle is corrupt, 3 if this machine does not reproduce the golden vectors.
    """

    start_s = time.monotonic()
    machine = open_machine(threads)
    with waiting("verifying …"):
        opened = open_bundle_given(bundle, machine)
        if component is not None:
            opened.component(component)
        checks = [] if no_run else _run_golden(opened, machine, component)
    problem = next((check["problem"] for check in checks if check["problem"]), None)
    files = opened.manifest.entries
    document = {
        "path": str(opened.root),
        "bundle_id": opened.manifest.bundle_id,
        "ok": problem is None,
        "files": len(files),
        "size_bytes": sum(entry.size_bytes for entry in files),
        "golden": None if no_run else checks,
        "seconds": time.monotonic() - start_s,
    }
    if as_json:
        print_json(document)
    else:
        _show_verified(document)
    if problem is not None:
        raise VerificationError(f"{bundle}: {problem}")


@bundle.command()
@click.argument("bundle", metavar="DIR", type=click.Path())
@click.argument("target", metavar="OUT.tar", type=click.Path())
@json_option
def pack(bundle: str, target: str, as_json: bool) -> None:
    """Verify the bundle DIR and write it as one uncompressed OUT.tar, which every command takes."""
    from edge_reasoner.contract.bundle.open import open_bundle
    from edge_reasoner.contract.bundle.tar import pack_bundle

    with waiting("packing …"):
        opened = open_bundle(bundle)
        path = pack_bundle(opened, target)
    _report_moved(path, opened, path.stat().st_size, as_json)


@bundle.command()
@click.argument("archive", metavar="BUNDLE.tar", type=click.Path())
@click.argument("target", metavar="DIR", type=click.Path())
@json_option
def unpack(archive: str, target: str, as_json: bool) -> None:
    """Unpack BUNDLE.tar to the new folder DIR and verify it."""
    from edge_reasoner.contract.bundle.tar import unpack_bundle_to

    with waiting("unpacking …"):
        opened = unpack_bundle_to(archive, target)
    _report_moved(Path(target), opened, sum(entry.size_bytes for entry in opened.manifest.entries), as_json)


def _report_moved(path: Path, opened: Bundle, size_bytes: int, as_json: bool) -> None:
    files = len(opened.manifest.entries)
    if as_json:
        identity = {"path": str(path), "bundle_id": opened.manifest.bundle_id}
        print_json({**identity, "files": files, "size_bytes": size_bytes})
    else:
        note(f"{path}: {files} files, {size_bytes / 1e6:.1f} MB, verified")


def _run_golden(opened: Bundle, machine: Machine, kind: str | None) -> list[dict[str, Any]]:
    """The self-test of every component (or one), from scratch: what an earlier one found does not count."""
    from edge_reasoner.bench.doctor import check_kernels

    return [check.as_dict() for check in check_kernels(opened, machine, kind=kind, fresh=True)]


def _document(opened: Bundle, kind: str | None) -> dict[str, Any]:
    import msgspec

    from edge_reasoner.contract.bundle.open import SIGNATURE_NAME

    manifest = opened.manifest
    parts = manifest.components if kind is None else (opened.component(kind),)
    plain_manifest: dict[str, Any] = msgspec.to_builtins(manifest)
    components = [
        {
            **msgspec.to_builtins(part),
            "size_bytes": sum(entry.size_bytes for entry in part.files),
        }
        for part in parts
    ]
    return {
        **plain_manifest,
        "path": str(opened.root),
        "signed": (opened.root / SIGNATURE_NAME).is_file(),
        # the report belongs to the whole bundle, not to one component
        "size_bytes": sum(part["size_bytes"] for part in components)
        + (sum(entry.size_bytes for entry in manifest.files) if kind is None else 0),
        "components": components,
    }


def _show(document: dict[str, Any]) -> None:
    from rich.table import Table

    out = console()
    facts = Table("bundle", plain(document["path"]))
    for name, value in (
        ("made for", document["profile"]),
        ("version", f"{document['version']}{', signed' if document['signed'] else ''}"),
        ("size", f"{document['size_bytes'] / 1e6:.1f} MB"),
        ("bundle id", document["bundle_id"]),
    ):
        facts.add_row(name, plain(value))
    out.print(facts)
    for part in document["components"]:
        table = Table(plain(part["kind"]), plain(f"{part['name']}, version {part['version']}"))
        for name, value in _component_rows(part):
            table.add_row(name, plain(value))
        out.print(table)


def _component_rows(part: dict[str, Any]) -> Iterator[tuple[str, str]]:
    source, spec = part["source"], part["spec"]
    yield "from", f"{source['name']} ({source['format']}, {source['size_bytes'] / 1e6:.1f} MB)"
    yield "licence", part["licence"]
    yield "made with", ", ".join(f"{name} {version}" for name, version in part["tools"].items())
    yield "model", f"{spec['family']}, {spec['parameters'] / 1e6:.1f} M, {spec['context_tokens']} tokens"
    variants = (v["id"] + (" (reference)" if v["reference"] else "") for v in part["variants"])
    yield "variants, fastest first", ", ".join(variants)
    yield "size", f"{part['size_bytes'] / 1e6:.1f} MB"
    yield "quality", _pairs(part["quality"]) or "–"
    yield "predicted", _pairs(part["predicted"] or {}) or "–"


def _pairs(figures: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in figures.items() if value is not None)


def _show_verified(document: dict[str, Any]) -> None:
    from edge_reasoner.cli.doctor import show_kernels

    out = console()
    size = f"{document['files']} files, {document['size_bytes'] / 1e6:.1f} MB"
    out.print(f"{plain(document['path'])}: {size}: every hash matches the manifest")
    if document["golden"] is not None:
        show_kernels(document["golden"], out)
    verdict = "verified" if document["ok"] else "golden vectors not reproduced"
    out.print(f"{verdict} in {document['seconds']:.1f} s")
