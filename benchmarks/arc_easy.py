"""Accuracy of our bundles on ARC-Easy questions, each beside the float32 bundle on the same questions.

    python benchmarks/arc_easy.py [--questions 500] [--recipes fp32,int8,auto,int4]

Scored as `edge-reasoner eval` does: `acc_norm` takes the choice with the largest log-likelihood per
character, `acc` the largest sum. Writes results/arc_easy.json and arc_easy.md. No time is measured.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench_common import DATA, RESULTS, WORK, provenance, say, write_results
from bench_models import RECIPES, make_bundles, parse_given, smollm2_gguf, weight_bytes
from bench_report import arc_easy_markdown

from edge_reasoner.bench.eval import Result, score_choices
from edge_reasoner.bench.questions import Question, read_questions
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.query.assemble import Machine

THREADS = 2
QUESTIONS_FILE = "arc_easy.jsonl"
_PROGRESS_EVERY = 100


def evaluate(path: Path, questions: Sequence[Question]) -> list[Result]:
    """The bundle's result on each question."""
    done = 0

    def advance() -> None:
        nonlocal done
        done += 1
        if done % _PROGRESS_EVERY == 0:
            say(f"{path.name}: {done} of {len(questions)}")

    machine = Machine(threads=THREADS, cache_dir=WORK / "activation")
    return score_choices(open_bundle(path), machine, questions, advance)


def accuracy(correct: Sequence[bool]) -> tuple[float, float]:
    """Share and its standard error."""
    share = sum(correct) / len(correct)
    return share, math.sqrt(share * (1 - share) / max(1, len(correct) - 1))


def paired(ours: Sequence[bool], others: Sequence[bool]) -> dict[str, float]:
    """Mean difference question by question, its standard error, and the share of questions that changed."""
    gaps = np.asarray(ours, np.float64) - np.asarray(others, np.float64)
    stderr = float(gaps.std(ddof=1)) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return {"difference": float(gaps.mean()), "stderr": stderr, "changed": float((gaps != 0).mean())}


def result_rows(results: dict[str, list[Result]], bundles: dict[str, Path]) -> list[dict[str, Any]]:
    """One row a recipe; `paired` where fp32 was scored too."""
    rows = []
    for recipe, answers in results.items():
        by_length = [answer.correct for answer in answers]
        by_sum = [bool(answer.by_sum) for answer in answers]
        row: dict[str, Any] = {"recipe": recipe, "weight_bytes": weight_bytes("edge", bundles[recipe])}
        row["acc_norm"], row["acc_norm_stderr"] = accuracy(by_length)
        row["acc"], row["acc_stderr"] = accuracy(by_sum)
        if recipe != "fp32" and "fp32" in results:
            row["paired"] = paired(by_length, [answer.correct for answer in results["fp32"]])
        rows.append(row)
    return rows


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--questions", type=int, default=500, help="how many, from the first on")
    parser.add_argument("--recipes", default="fp32,int8,auto,int4", help=f"of {', '.join(RECIPES)}")
    parser.add_argument(
        "--bundle", action="append", default=[], metavar="RECIPE=DIR", help="of SmolLM2, not exported anew"
    )
    parser.add_argument("--data", type=Path, default=DATA, help=f"folder with {QUESTIONS_FILE}")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args()
    recipes = options.recipes.split(",")
    for recipe in recipes:
        if recipe not in RECIPES:
            parser.error(f"--recipes: {recipe!r} is not allowed; allowed: {', '.join(RECIPES)}")
    if not (options.data / QUESTIONS_FILE).is_file():
        parser.error(f"--data: {options.data} has no {QUESTIONS_FILE}")
    questions = read_questions(options.data / QUESTIONS_FILE, metric="choice", limit=options.questions)
    bundles = make_bundles(smollm2_gguf(), "smollm2", recipes, parse_given(options.bundle))
    results = {recipe: evaluate(path, questions) for recipe, path in bundles.items()}
    document = {
        "provenance": provenance("arc_easy.py", sys.argv[1:]),
        "model": "SmolLM2-135M-Instruct",
        "questions": len(questions),
        "file": QUESTIONS_FILE,
        "rows": result_rows(results, bundles),
    }
    write_results("arc_easy", document, arc_easy_markdown(document), options.out)
    print(arc_easy_markdown(document))


if __name__ == "__main__":
    main()
