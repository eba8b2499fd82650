"""Bundles for a board with an older onnxruntime load and agree under it, in a venv of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.tiny_checkpoints import write_checkpoint

from edge_export.options import ExportOptions
from edge_export.pipeline import export

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = "EDGE_REASONER_ORT123_PYTHON"


@pytest.fixture(scope="module")
def old_python() -> str:
    """The interpreter of a venv with onnxruntime 1.23.2, what JetPack 6 is tied to."""
    python = os.environ.get(VARIABLE)
    if not python:
        pytest.skip(f"{VARIABLE} names no Python with onnxruntime 1.23.2; `make test-all` sets it")
    return python


@pytest.mark.parametrize(
    ("case", "recipe"),
    [
        ("llama", "auto"),
        ("llama", "fp32"),
        ("llama", "fp16"),
        ("qwen2", "int8"),
        ("qwen3", "mixed"),
        ("mistral-window", "int4"),
        ("gemma3", "auto"),
        ("gemma3-softcap", "fp16"),
    ],
)
def test_jetson_bundles_under_its_onnxruntime(case, recipe, old_python, tmp_path):
    """Every family and recipe: 1.23.2 opens the graphs, and each variant reproduces the golden vectors."""
    write_checkpoint(tmp_path / "model", case)
    export(str(tmp_path / "model"), "jetson-orin", tmp_path / "out", ExportOptions(recipe=recipe, threads=1))
    script = ROOT / "tests/support/replay_bundle.py"
    done = subprocess.run(
        [old_python, str(script), str(tmp_path / "out"), str(tmp_path / "cache")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert result["runtime"] == "1.23.2"
    assert result["variants"] and all(v["problem"] == "" for v in result["variants"].values()), result
    exact = 2e-2 if recipe == "fp16" else 2e-3
    assert all(v["error"] <= exact for v in result["variants"].values() if v["reference"]), result
