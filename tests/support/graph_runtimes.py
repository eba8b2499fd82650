"""Do the runtimes, the newest and the oldest, see a graph as our reader does, and stay alive?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_reasoner.contract.bundle.onnx_scan import FLOAT, FLOAT16, INT32, INT64, scan_graph

CHILD = Path(__file__).with_name("run_graphs.py")
OLD_PYTHON = "EDGE_REASONER_ORT123_PYTHON"
_RUNTIME_TYPES = {
    FLOAT: "tensor(float)",
    FLOAT16: "tensor(float16)",
    INT32: "tensor(int32)",
    INT64: "tensor(int64)",
}


def runtime_agrees(python: str, accepted: Sequence[str]) -> None:
    """Of graph files that the check lets pass: it loads and runs each, or refuses it in words.

    It does not die, and sees our inputs and outputs.
    """
    done = subprocess.run(
        [python, str(CHILD)],
        input="".join(f"{path}\n" for path in accepted),
        capture_output=True,
        text=True,
        timeout=60 + len(accepted),
        check=False,
    )
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    dead = accepted[len(seen)] if len(seen) < len(accepted) else None
    assert (done.returncode, dead) == (0, None), done.stderr[-500:]
    loaded = 0
    for outcome in seen:
        if not outcome["inputs"]:
            assert outcome["error"]
            continue
        loaded += 1
        model = scan_graph(Path(outcome["path"]).read_bytes(), "g.onnx")
        for found, ours in ((outcome["inputs"], model.inputs), (outcome["outputs"], model.outputs)):
            assert [tuple(value) for value in map(freeze, found)] == [
                (value.name, _RUNTIME_TYPES[value.type], value.shape) for value in ours
            ]
    assert loaded > len(accepted) // 2


def freeze(value: list) -> tuple:
    """A value's name, type and shape out of JSON."""
    name, kind, shape = value
    return name, kind, tuple(shape)


def pythons() -> list[str]:
    """The newest runtime, which is this process's, and the oldest supported where there is one."""
    old = os.environ.get(OLD_PYTHON)
    return [sys.executable, *([old] if old else [])]
