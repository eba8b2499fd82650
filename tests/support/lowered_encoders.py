"""Encoders taken through the exporter's stages, without a bundle around them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edge_export.options import ExportOptions
from edge_export.pipeline import PLANNING
from edge_export.progress import silent
from edge_export.stages.lower import lower
from edge_export.stages.store import store
from edge_export.stages.values import Job, Lowered, Run
from edge_export.storage.stage_cache import StageCache
from edge_reasoner.contract.profile import DeviceProfile


def lower_encoder(
    model: Path, recipe: str, profile: DeviceProfile, folder: Path, progress: Callable = silent
) -> Lowered:
    """Writes graphs and weights of the encoder in `model` under `folder`."""
    folder.mkdir(exist_ok=True)
    run = Run(progress, StageCache(None), folder)
    value = Job(model=str(model), board=profile, options=ExportOptions(recipe=recipe, threads=1))
    for stage in (*PLANNING, store, lower):
        value = stage(run, value)
    return value
