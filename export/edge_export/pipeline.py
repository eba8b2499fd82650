"""The stages of an export in their one order, for every kind of model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from edge_export.model.threads import torch_threads
from edge_export.options import ExportOptions
from edge_export.progress import Progress, silent
from edge_export.stages.analyse import analyse
from edge_export.stages.check import check
from edge_export.stages.code import code_version
from edge_export.stages.find import find
from edge_export.stages.load import load
from edge_export.stages.lower import lower
from edge_export.stages.measure import measure
from edge_export.stages.pack import check_destination, pack, restore_earlier, staging_folder
from edge_export.stages.plan import plan
from edge_export.stages.report import report
from edge_export.stages.store import store
from edge_export.stages.values import ExportReport, Job, Packed, Planned, Run
from edge_export.stages.verify import verify
from edge_export.storage.room import full_disk_named
from edge_export.storage.stage_cache import StageCache
from edge_reasoner.contract.profile import DeviceProfile, load_profile
from edge_reasoner.errors import EdgeReasonerError, InputError, shown

#: Each takes the value of the one before it. All components of a bundle go through a stage before any goes on
#: to the next, so that nothing is computed for one while another cannot be used at all.
PLANNING: Final[tuple[Callable[[Run, Any], Any], ...]] = (find, load, check, analyse, plan)
MAKING: Final[tuple[Callable[[Run, Any], Any], ...]] = (store, lower, verify, measure)
BUNDLING: Final[tuple[Callable[[Run, Any], Any], ...]] = (report, pack)  # of all components together
STAGES: Final = tuple(stage.__name__ for stage in (*PLANNING, *MAKING, *BUNDLING))


def export(
    model: str,
    profile: str | DeviceProfile,
    out: Path | str,
    options: ExportOptions | None = None,
    progress: Progress = silent,
    *,
    cache: Path | str | None = None,
) -> ExportReport:
    """Exports `model` (path or hub id) for a board; the Python twin of `edge-export`.

    Writes the bundle directory `out` atomically, or nothing. Results of stages are kept in the folder `cache`
    (None: nowhere), so that an interrupted export, started again, resumes. Raises InputError and its kin for
    input that cannot be used, TargetError, VerificationError or CheckFailedError for checks that failed.
    """
    if options is not None and not isinstance(options, ExportOptions):
        raise InputError(f"options={shown(options)} is not allowed; give ExportOptions")
    if not callable(progress):
        raise InputError(f"progress={shown(progress)} is not allowed; give a function")
    options, out = options or ExportOptions(), _as_path("out", out)
    if not isinstance(model, (str, Path)):
        raise InputError(f"model={shown(model)} is not allowed; give a path or a hub id")
    board = profile if isinstance(profile, DeviceProfile) else load_profile(profile)
    if not options.dry_run:
        check_destination(out)
        restore_earlier(out)
    with torch_threads(options.threads):
        return _export(str(model), board, out, options, progress, cache)


def _export(
    model: str,
    board: DeviceProfile,
    out: Path,
    options: ExportOptions,
    progress: Progress,
    cache: Path | str | None,
) -> ExportReport:
    started = time.monotonic()
    run = Run(progress, StageCache(None if cache is None else _as_path("cache", cache), salt=code_version))
    values: tuple[Any, ...] = _jobs(model, board, options)
    done: list[str] = []
    for stage in PLANNING:
        values = _step(stage, run, values, done)
    packed: Packed | None = None
    if not options.dry_run:
        with staging_folder(out) as folder:
            run = dataclasses.replace(run, folder=folder)
            for stage in MAKING:
                values = _step(stage, run, values, done)
            whole: Any = values
            for stage in BUNDLING:
                (whole,) = _step(stage, run, (whole,), done)
            packed = whole
    return _report(values[0], packed, out, run.cache.reused, time.monotonic() - started)


def _as_path(name: str, value: object) -> Path:
    if not isinstance(value, (str, Path)):
        raise InputError(f"{name}={shown(value)} is not allowed; give a folder's path")
    return Path(value)


def _jobs(model: str, board: DeviceProfile, options: ExportOptions) -> tuple[Job, ...]:
    """The model, and the preprocessor that goes through the same stages beside it."""
    jobs = [Job(model=model, board=board, options=options)]
    if options.preprocessor is not None:
        own = ExportOptions(
            task="encoder",
            recipe=options.preprocessor_recipe,
            calibration=options.calibration,
            quality_text=options.quality_text,
            version=options.version,
            threads=options.threads,
        )
        jobs.append(Job(model=options.preprocessor, board=board, options=own))
    return tuple(jobs)


def _step(
    stage: Callable[[Run, Any], Any], run: Run, values: tuple[Any, ...], done: list[str]
) -> tuple[Any, ...]:
    """Runs a stage for every value. A failure names the stages that had run."""
    run.progress(stage.__name__, len(done), len(STAGES))
    try:
        with full_disk_named(stage.__name__):
            values = tuple(stage(run, value) for value in values)
    except EdgeReasonerError as error:
        if done:
            error.args = (f"{error} (after {', '.join(done)})",)
        raise
    done.append(stage.__name__)
    return values


def _report(
    main: Planned, packed: Packed | None, out: Path, reused: tuple[str, ...], seconds: float
) -> ExportReport:
    return ExportReport(
        bundle=None if packed is None else out,
        profile=main.board.name,
        plan=main.plan.to_dict(),
        sizes={} if packed is None else packed.sizes,
        quality={} if packed is None else dict(packed.components[0].quality),
        predicted=msgspec.structs.asdict(main.predicted),
        warnings=main.warnings if packed is None else packed.warnings,
        seconds=seconds,
        reused=reused,
    )
