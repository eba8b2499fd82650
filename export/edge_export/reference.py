"""What the reference cloud serves: the unpruned, unquantized model as an fp32 bundle.

The device package finds this through the entry point `edge_reasoner.exporters`, so it needs no import of the
export stage.
"""

from __future__ import annotations

import os
from pathlib import Path

_PROFILE = "generic-x86"


def export_reference(model: str, out: Path) -> Path:
    """Exports `model` (path or hub id) in float32 to the bundle `out`; returns `out`. Raises as `export`."""
    # As in `cli.py`: waiting threads must not spin. Read once, when torch is loaded by the next import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from edge_export.options import ExportOptions
    from edge_export.pipeline import export

    export(model, _PROFILE, out, ExportOptions(recipe="fp32"))
    return out
