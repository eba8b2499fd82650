"""Loads graphs through the project's seam to onnxruntime, in any Python that has it, and runs what loads.

python load_graphs.py GRAPH…      prints one JSON object: for each graph the error's text, or null
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from edge_reasoner.backends.onnxruntime.session import CPU, library_errors, open_session, runtime_version
from edge_reasoner.errors import EdgeReasonerError


def _outcome(path: Path) -> str | None:
    try:
        session = open_session(path, CPU, {}, 1)
        with library_errors("running"):
            session.get().run(None, {"x": np.ones(3, np.float32)})
    except EdgeReasonerError as error:
        return str(error)
    return None


if __name__ == "__main__":
    outcomes = {Path(name).name: _outcome(Path(name)) for name in sys.argv[1:]}
    print(json.dumps({"runtime": runtime_version(), "outcomes": outcomes}))
