"""Runs every fuzzer of `tests/hostile/fuzz` for long, and writes what came of it to `results/fuzz.json`.

python benchmarks/fuzz.py [INPUTS]      inputs for each fuzzer, 50,000 unless given

Each file of fuzzers runs in a process of its own: a crash of native code ends that one and is counted.
Mutations are drawn at random from seeds, with words of the format; they are not guided by coverage.
Exit status 1 where an input crashed, hung (over 5 s of processor time) or took over 1 GB.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_common import RESULTS, ROOT, provenance, say, write_atomically

FUZZERS = ROOT / "tests" / "hostile" / "fuzz"
INPUTS = 50_000
_NO_TESTS = 5  # pytest's status where a file has no long run


def main() -> int:
    """Runs, writes, and returns the exit status."""
    inputs = int(sys.argv[1]) if len(sys.argv) > 1 else INPUTS
    rows = [row for file in sorted(FUZZERS.glob("test_*.py")) for row in _run(file, inputs)]
    bad = sum(row["crashes"] + row["hangs"] + row["grown_over_1_gb"] for row in rows)
    document = {
        "provenance": provenance("fuzz.py", sys.argv[1:]),
        "inputs_each": inputs,
        "inputs": sum(row["inputs"] for row in rows),
        "crashes": sum(row["crashes"] for row in rows),
        "hangs_over_5_s": sum(row["hangs"] for row in rows),
        "grown_over_1_gb": sum(row["grown_over_1_gb"] for row in rows),
        "rows": rows,
    }
    write_atomically(RESULTS / "fuzz.json", json.dumps(document, indent=1) + "\n")
    say(f"{document['inputs']:,} inputs to {len(rows)} fuzzers: {bad} findings")
    return 1 if bad or any(row["inputs"] < inputs for row in rows) else 0


def _run(file: Path, inputs: int) -> Iterator[dict[str, Any]]:
    """The rows of one file's fuzzers, and one more where its process did not end as it should."""
    say(f"{file.name} …")
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "rows.jsonl"
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-m", "slow", str(file)],
            cwd=ROOT,
            env={
                **os.environ,
                "EDGE_REASONER_FUZZ_INPUTS": str(inputs),
                "EDGE_REASONER_FUZZ_ROWS": str(lines),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        rows = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    yield from rows
    found = any(row["findings"] for row in rows)
    if done.returncode not in (0, _NO_TESTS) and not found:
        said = done.stdout[-2000:] + done.stderr[-2000:]
        yield {
            "fuzzer": f"{file.name}: ended with {done.returncode}",
            **{"inputs": inputs, "refused": 0, "crashes": 1, "hangs": 0, "grown_over_1_gb": 0},
            **{"growth_mb": 0.0, "findings": [said]},
        }


if __name__ == "__main__":
    sys.exit(main())
