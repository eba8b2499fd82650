"""report: the bundle's `report.html`: what was decided and measured, for people. No scripts, nothing from
outside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import msgspec

from edge_export.stages.values import Measured, Reported, Run
from edge_reasoner.errors import printable

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem;color:#1d2330}
h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}
td,th{padding:.2rem .7rem;border-bottom:1px solid #dde1e8;text-align:left}td.n{text-align:right}
rect.w8{fill:#b4552d}rect.w4{fill:#4a7ebb}rect.wf{fill:#5d8a4a}text{font:11px system-ui,sans-serif}
"""

REPORT_FILE = "report.html"


def report(run: Run, components: tuple[Measured, ...]) -> Reported:
    """Writes the page about all components; the first is the model that was asked for."""
    main, *others = components
    warnings = list(main.warnings)
    if _licence(main) is None:
        warnings.append("the checkpoint names no licence; give one with licence=…")
    facts = {"source": main.checkpoint.name, "profile": main.board.name, **_facts(main)}
    for other in others:
        warnings += [f"{other.role}: {warning}" for warning in other.warnings]
        if _licence(other) is None:
            warnings.append(f"the {other.role} names no licence")
        facts |= {f"{other.role} {name}": value for name, value in _facts(other).items()}
    units = main.plan.to_dict().get("units", ())
    title = f"{main.checkpoint.name} for {main.board.title}"
    (run.bundle / REPORT_FILE).write_bytes(render_report(title, facts, units, warnings))
    return Reported(components=components, files=(REPORT_FILE,), warnings=tuple(warnings))


def _licence(component: Measured) -> str | None:
    return component.options.licence or component.checkpoint.licence


def _facts(component: Measured) -> dict[str, Any]:
    plan = component.plan.to_dict()
    plain = {name: value for name, value in plan.items() if not isinstance(value, (list, dict))}
    return {**plain, **component.quality, **msgspec.structs.asdict(component.predicted)}


def render_report(
    title: str, facts: Mapping[str, Any], plan_units: Sequence[Mapping[str, Any]], warnings: Sequence[str]
) -> bytes:
    """A self-contained page: a table of facts, the map of precisions by layer, warnings."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(_shown(value))}</td></tr>" for name, value in facts.items()
    )
    notes = "".join(f"<li>{escape(warning)}</li>" for warning in warnings) or "<li>none</li>"
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1><table>{rows}</table>"
        f"<h2>Precision of each unit</h2>{_precision_map(plan_units)}"
        f"<h2>Warnings</h2><ul>{notes}</ul></html>\n"
    )
    # a folder's name may be no Unicode; nothing in it may turn the text around
    return printable(page).encode("utf-8", "replace")


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _precision_map(units: Sequence[Mapping[str, Any]]) -> str:
    """One column a layer, one row a kind of unit; estimated loss in each cell's tooltip."""
    cells: dict[tuple[str, str], Mapping[str, Any]] = {}
    for unit in units:
        parts = str(unit["unit"]).split(".")
        cells[(parts[-1], parts[1] if len(parts) == 3 else "-")] = unit
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells}, key=lambda layer: -1 if layer == "-" else int(layer))
    shapes = []
    for y, kind in enumerate(kinds):
        shapes.append(f"<text x=0 y={y * 18 + 13}>{escape(kind)}</text>")
        for x, layer in enumerate(layers):
            unit_at = cells.get((kind, layer))
            if unit_at is None:
                continue
            label = str(unit_at["format"])
            style = "w4" if "int4" in label else "w8" if "int8" in label else "wf"
            loss = f", loss {unit_at['loss_nats']} nats" if "loss_nats" in unit_at else ""
            shapes.append(
                f"<rect class={style} x={70 + x * 18} y={y * 18} width=16 height=16>"
                f"<title>{escape(str(unit_at['unit']))}: {escape(label)}{loss}</title></rect>"
            )
    width, height = 80 + 18 * len(layers), 18 * len(kinds) + 4
    legend = (
        "<p>blue 4 bits, orange 8 bits, green float; one column a layer, the first one the vocabulary</p>"
    )
    return f"<svg width={width} height={height} role=img>{''.join(shapes)}</svg>{legend}"
