"""The export stage: a trained model becomes a verified bundle for one named board.

from edge_export import export
report = export("SmolLM2-135M.gguf", profile="raspberry-pi-5", out="bundle/")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_export.options import ExportOptions
    from edge_export.pipeline import export
    from edge_export.stages.values import ExportReport

__all__ = ["export", "ExportOptions", "ExportReport"]


def __getattr__(name: str) -> Any:
    """Imports torch only when something is used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from edge_export import options, pipeline

    return options.ExportOptions if name == "ExportOptions" else getattr(pipeline, name)
