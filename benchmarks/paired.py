"""Is this checkout slower, larger or hungrier than another one? Both in turn, on bundles of their own.

    python benchmarks/paired.py --before ../other-checkout [--recipes int8,auto] [--rounds 5]

Each round runs `edge-reasoner bench --json` and `chat_turns.py` with both checkouts one after the other (the
order changes from round to round), so that a machine whose speed drifts moves both alike; every figure is the
median of the rounds, and the ratios are taken round by round. Leave the machine alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench_common import RESULTS, ROOT, WORK, markdown_table, provenance, say, write_results

#: figure → whether more is better
FIGURES: Mapping[str, bool] = {
    "decode_tps": True,
    "prefill_tps": True,
    "cold_first_token_ms": False,
    "load_ms": False,
    "peak_rss_mb": False,
    **{f"turn_{turn}_ttft_ms": False for turn in (1, 2, 3, 4)},
}
_TIMEOUT_S = 1800
_PROFILE = "raspberry-pi-5"


def run(checkout: Path, *command: str) -> dict[str, Any]:
    """Runs Python with a checkout's packages and gives the JSON object printed. SystemExit when it fails."""
    paths = os.pathsep.join([str(checkout), str(checkout / "export")])
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, "PYTHONPATH": paths},
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{checkout.name}: {' '.join(command)}: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def bundle_of(checkout: Path, side: str, model: Path, recipe: str) -> Path:
    """The side's own bundle; made when it is not there yet."""
    out = WORK / "paired" / f"{side}-{recipe}"
    if not (out / "manifest.json").exists():
        say(f"exporting {recipe} with the code {side}")
        run(
            checkout,
            *("-m", "edge_export.cli", str(model), "--profile", _PROFILE),
            *("--recipe", recipe, "--out", str(out), "--json"),
        )
    return out


def figures(checkout: Path, bundle: Path) -> dict[str, float]:
    """One measurement of all figures."""
    found = run(checkout, "-m", "edge_reasoner.cli.main", "bench", str(bundle), "--repeat", "3", "--json")
    turns = run(checkout, str(ROOT / "benchmarks" / "chat_turns.py"), str(bundle), "--conversations", "3")
    for number, ttft_ms in enumerate(turns["ttft_ms"], 1):
        found[f"turn_{number}_ttft_ms"] = ttft_ms
    return {name: float(found[name]) for name in FIGURES}


def bundle_bytes(bundle: Path) -> int:
    """All files of a bundle."""
    return sum(path.stat().st_size for path in bundle.rglob("*") if path.is_file())


def compared(before: Sequence[Mapping[str, float]], after: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Medians of both sides and of the ratios after/before, round by round."""
    found = {}
    for name in FIGURES:
        pairs = [(b[name], a[name]) for b, a in zip(before, after, strict=True)]
        ratios = [a / b for b, a in pairs]
        found[name] = {
            "before": statistics.median(b for b, _ in pairs),
            "after": statistics.median(a for _, a in pairs),
            "ratio": statistics.median(ratios),
            "ratio_min": min(ratios),
            "ratio_max": max(ratios),
        }
    return found


def table(document: Mapping[str, Any]) -> str:
    """The Markdown table of a result."""
    rows = []
    for recipe, result in document["recipes"].items():
        for name, row in result["figures"].items():
            better = "more" if FIGURES[name] else "less"
            spread = f"{row['ratio']:.3f} ({row['ratio_min']:.3f}–{row['ratio_max']:.3f})"
            rows.append(
                [
                    f"{recipe} · {name} ({better} is better)",
                    f"{row['before']:.4g}",
                    f"{row['after']:.4g}",
                    spread,
                ]
            )
        sizes = result["bundle_bytes"]
        rows.append(
            [
                f"{recipe} · bundle bytes",
                str(sizes["before"]),
                str(sizes["after"]),
                f"{sizes['after'] / sizes['before']:.4f}",
            ]
        )
    return markdown_table(["figure", "before", "after", "after / before"], rows)


def measure(sides: Mapping[str, Path], model: Path, recipe: str, rounds: int) -> dict[str, Any]:
    """One recipe: both sides' runs in turn."""
    bundles = {side: bundle_of(checkout, side, model, recipe) for side, checkout in sides.items()}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(rounds):
        order = list(sides) if number % 2 == 0 else list(reversed(sides))
        for side in order:
            say(f"{recipe}: round {number + 1} of {rounds}, {side}")
            runs[side].append(figures(sides[side], bundles[side]))
    return {
        "figures": compared(runs["before"], runs["after"]),
        "bundle_bytes": {side: bundle_bytes(bundle) for side, bundle in bundles.items()},
        "rounds": rounds,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--after", type=Path, default=ROOT)
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--recipes", default="int8,auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    sides = {"before": options.before.resolve(), "after": options.after.resolve()}
    document: dict[str, Any] = {
        "provenance": provenance("paired.py", sys.argv[1:]),
        "before_commit": _commit(sides["before"]),
        "after_commit": _commit(sides["after"]),
        "recipes": {
            recipe: measure(sides, options.model.resolve(), recipe, options.rounds)
            for recipe in options.recipes.split(",")
        },
    }
    write_results("paired", document, table(document), options.out)
    sys.stdout.write(table(document))


def _commit(checkout: Path) -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=checkout,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
