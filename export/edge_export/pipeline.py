"""The stages of an export, in their one order: load, plan, quantize and lower, verify, report, pack."""

from __future__ import annotations

import importlib.metadata
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec
from tokenizers import Tokenizer

from edge_export.checkpoint.bert import EncoderCheckpoint, load_encoder
from edge_export.checkpoint.hub import resolve_model
from edge_export.checkpoint.load import DecoderCheckpoint, detect, find_model, load_checkpoint
from edge_export.checkpoint.tokenizer import limit_vocabulary, load_tokenizer_files
from edge_export.checkpoint.tokenizer_files import TokenizerFiles
from edge_export.data.texts import TextSet, calibration_text, probe_text, read_text_set, to_token_batches
from edge_export.options import ExportOptions
from edge_export.plan.plan import Recipe
from edge_export.progress import Progress, silent
from edge_export.stages.decoder import PlannedDecoder, Texts, export_stage, plan_stage
from edge_export.stages.encoder import LoweredEncoder, encoder_golden, encoder_quality, lower_encoder
from edge_export.stages.pack import (
    MAX_TEMPLATE_BYTES,
    bundle_bytes,
    check_destination,
    file_entries,
    staging_folder,
    write_golden,
    write_manifest,
    write_tokenizer,
)
from edge_export.stages.report import render_report
from edge_reasoner.backends.golden import try_encoder
from edge_reasoner.backends.onnxruntime_backend import OrtEncoderSession
from edge_reasoner.contract.bundle.manifest import Component, Manifest, Predicted, Source
from edge_reasoner.contract.profile import DeviceProfile, load_profile, profile_sha256
from edge_reasoner.contract.profile.cost import GraphCost, predict, predict_encoder
from edge_reasoner.errors import CheckFailedError, InputError, TargetError, VerificationError

_TOOLS: Final = (
    "edge-reasoner",
    "gguf",
    "numpy",
    "onnx-ir",
    "onnxruntime",
    "safetensors",
    "tokenizers",
    "torch",
)
#: Calibration work grows with both: a larger model needs fewer tokens to show which inputs matter.
_CALIBRATION_WORK: Final = 6e11
_MAX_CALIBRATION_TOKENS, _MIN_CALIBRATION_TOKENS = 2048, 384
_MAX_QUALITY_TOKENS: Final = 1024
_SEQUENCE_TOKENS: Final = 512
_PREDICTED_PROMPT_TOKENS, _PREDICTED_NEW_TOKENS = 512, 128


@dataclass(frozen=True)
class ExportReport:
    """What an export made; `to_dict` is `edge-export --json`."""

    bundle: Path | None
    profile: str
    plan: Mapping[str, Any]
    sizes: Mapping[str, float]
    quality: Mapping[str, float]
    predicted: Mapping[str, float | None]
    warnings: tuple[str, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The contract's JSON object. `measured` is null: the board's own figures come from `bench`."""
        return {
            "bundle": None if self.bundle is None else str(self.bundle),
            "profile": self.profile,
            "plan": dict(self.plan),
            "sizes": dict(self.sizes),
            "quality": dict(self.quality),
            "predicted": dict(self.predicted),
            "measured": None,
            "warnings": list(self.warnings),
            "seconds": round(self.seconds, 1),
        }


@dataclass
class _Packed:
    """What has been written into the staging folder so far."""

    folder: Path
    components: list[Component] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def export(
    model: str,
    profile: str | DeviceProfile,
    out: Path | str,
    options: ExportOptions | None = None,
    progress: Progress = silent,
) -> ExportReport:
    """Exports `model` (path or hub id) for a board; the Python twin of `edge-export`.

    Writes the bundle directory `out` atomically, or nothing. Raises InputError and its kin for input that
    cannot be used, TargetError, VerificationError or CheckFailedError for checks that failed.
    """
    started = time.monotonic()
    options, out = options or ExportOptions(), Path(out)
    board = load_profile(profile) if isinstance(profile, str) else profile
    if not options.dry_run:
        check_destination(out)
    path = find_model(resolve_model(model))
    kind = detect(path)
    wanted = {"auto": kind, "causal-lm": "decoder", "encoder": "encoder"}[options.task]
    if wanted != kind:
        raise InputError(f"{model}: --task {options.task}, but the model is {_article(kind)}")
    if kind == "encoder":
        if options.preprocessor is not None:
            raise InputError("--preprocessor: only a causal LM has one; the model is an encoder itself")
        report = _export_encoder(load_encoder(path), board, out, options, progress)
    else:
        report = _export_decoder(load_checkpoint(path), path, board, out, options, progress)
    return _timed(report, time.monotonic() - started)


def _article(kind: str) -> str:
    return "an encoder" if kind == "encoder" else "a causal LM"


def _timed(report: ExportReport, seconds: float) -> ExportReport:
    fields = {name: getattr(report, name) for name in report.__dataclass_fields__}
    return ExportReport(**{**fields, "seconds": seconds})


def _export_decoder(
    checkpoint: DecoderCheckpoint,
    path: Path,
    board: DeviceProfile,
    out: Path,
    options: ExportOptions,
    progress: Progress,
) -> ExportReport:
    tokenizer = limit_vocabulary(load_tokenizer_files(path), checkpoint.config.vocab_size)
    preprocessor = None
    if options.preprocessor is not None:
        preprocessor = load_encoder(find_model(resolve_model(options.preprocessor)))
    texts = _texts(checkpoint, tokenizer, board, options)
    recipe: Recipe = options.recipe  # type: ignore[assignment]  # checked by ExportOptions
    planned = plan_stage(
        checkpoint, board, recipe, options.quantizer, options.context_tokens, texts, progress
    )
    predicted = _predicted(planned.cost, board)
    _check_latency(predicted, options)
    if options.dry_run:
        shown = msgspec.structs.asdict(_manifest_prediction(predicted))
        return _report(None, board, planned.plan.to_dict(), {}, {}, shown, tokenizer.warnings)
    with staging_folder(out) as folder:
        packed = _Packed(folder, warnings=list(tokenizer.warnings))
        _pack_decoder(packed, checkpoint, tokenizer, planned, predicted, board, texts, options, progress)
        if preprocessor is not None:
            _pack_encoder(packed, preprocessor, board, "int8", preprocessor.licence, options, progress)
        return _finish(packed, board, options, out)


def _pack_decoder(
    packed: _Packed,
    checkpoint: DecoderCheckpoint,
    tokenizer: TokenizerFiles,
    planned: PlannedDecoder,
    predicted: Mapping[str, float | None],
    board: DeviceProfile,
    texts: Texts,
    options: ExportOptions,
    progress: Progress,
) -> None:
    folder = packed.folder
    bos = tokenizer.bos_token_id if tokenizer.add_bos else None
    ends = tuple(dict.fromkeys((*checkpoint.config.eos_token_ids, *tokenizer.eos_token_ids)))
    done = export_stage(checkpoint, planned, board, bos, ends, texts, folder, options.threads, progress)
    packed.warnings.extend(done.warnings)
    template = checkpoint.chat_template or tokenizer.chat_template
    if template is not None and len(template.encode()) > MAX_TEMPLATE_BYTES:
        packed.warnings.append(f"the chat template exceeds {MAX_TEMPLATE_BYTES} bytes and was left out")
        template = None
    files = [*done.files, *write_tokenizer(folder, "reasoner", tokenizer, template)]
    golden = write_golden(folder, "reasoner", done.golden)
    packed.components.append(
        Component(
            kind="reasoner",
            name=checkpoint.name[:200],
            version=options.version,
            licence=_licence(options.licence or checkpoint.licence, "the checkpoint", packed),
            source=_source(checkpoint, texts.calibration_sha256 if planned.head_analysis else None),
            tools=_tool_versions(),
            plan=dict(planned.plan.to_dict()),
            predicted=_manifest_prediction(predicted),
            spec=done.spec,
            variants=done.variants,
            golden=golden,
            tokenizer="tokenizer/reasoner",
            files=file_entries(folder, [*files, golden]),
            quality={name: float(f"{value:.5g}") for name, value in done.quality.to_dict().items()},
        )
    )


def _pack_encoder(
    packed: _Packed,
    checkpoint: EncoderCheckpoint,
    board: DeviceProfile,
    recipe: str,
    licence: str | None,
    options: ExportOptions,
    progress: Progress,
) -> None:
    """Lowers, verifies and measures an encoder as the bundle's preprocessor."""
    folder, kind = packed.folder, "preprocessor"
    lowered = lower_encoder(checkpoint, recipe, board, folder, progress)
    golden = encoder_golden(checkpoint, recipe)
    quality: dict[str, float] = {}
    for variant in reversed(lowered.variants):
        progress("verifying the encoder", 0, 1)
        session = OrtEncoderSession(
            folder / variant.graph,
            lowered.spec,
            provider=variant.execution_provider,
            session_options=variant.session_options,
            threads=options.threads,
        )
        try:
            trial = try_encoder(session, golden, time.perf_counter)
            if trial.problem:
                raise VerificationError(f"{variant.graph}: does not reproduce torch: {trial.problem}")
            quality = encoder_quality(checkpoint, session, _sentences(options))
        finally:
            session.close()
    tokenizer_files = write_tokenizer(folder, kind, checkpoint.tokenizer, None)
    golden_path = write_golden(folder, kind, golden)
    files = [*lowered.files, *tokenizer_files, golden_path]
    packed.components.append(
        Component(
            kind="preprocessor",
            name=checkpoint.name[:200],
            version=options.version,
            licence=_licence(
                licence, "the checkpoint" if not packed.components else "the preprocessor", packed
            ),
            source=_source(checkpoint, None),
            tools=_tool_versions(),
            plan=_encoder_plan(lowered, board),
            predicted=_manifest_prediction(_encoder_prediction(lowered, board)),
            spec=lowered.spec,
            variants=lowered.variants,
            golden=golden_path,
            tokenizer=f"tokenizer/{kind}",
            files=file_entries(folder, files),
            quality={name: float(f"{value:.5g}") for name, value in quality.items()},
        )
    )


def _export_encoder(
    checkpoint: EncoderCheckpoint,
    board: DeviceProfile,
    out: Path,
    options: ExportOptions,
    progress: Progress,
) -> ExportReport:
    recipe = {"auto": "int8"}.get(options.recipe, options.recipe)
    if options.dry_run:
        with tempfile.TemporaryDirectory() as scratch:
            lowered = lower_encoder(checkpoint, recipe, board, Path(scratch), progress)
        plan = _encoder_plan(lowered, board)
        return _report(None, board, plan, {}, {}, _encoder_prediction(lowered, board), ())
    with staging_folder(out) as folder:
        packed = _Packed(folder, warnings=list(checkpoint.tokenizer.warnings))
        licence = options.licence or checkpoint.licence
        _pack_encoder(packed, checkpoint, board, recipe, licence, options, progress)
        return _finish(packed, board, options, out)


def _encoder_plan(lowered: LoweredEncoder, board: DeviceProfile) -> dict[str, Any]:
    return {
        "recipe": lowered.recipe,
        "profile": board.name,
        "weight_bytes": lowered.weight_bytes,
        "matrices": [dict(row) for row in lowered.plan],
    }


def _encoder_prediction(lowered: LoweredEncoder, board: DeviceProfile) -> dict[str, float | None]:
    cost = predict_encoder(lowered.cost, board)
    return {
        "prefill_tps": cost.tokens_per_s,
        "decode_tps": None,
        "ttft_ms": cost.latency_ms,
        "peak_rss_mb": cost.peak_rss_mb,
        "joules_per_token": None,
    }


def _finish(
    packed: _Packed,
    board: DeviceProfile,
    options: ExportOptions,
    out: Path,
) -> ExportReport:
    """Checks the limits, writes report and manifest."""
    main = packed.components[0]
    plan, source, quality = main.plan, main.source, dict(main.quality)
    predicted = msgspec.structs.asdict(main.predicted) if main.predicted is not None else {}
    _check_quality(quality, options)
    facts = {"source": source.name, "profile": board.name, **_summary(plan), **quality, **predicted}
    report_file = "report.html"
    units = list(plan.get("units", ()))
    title = f"{source.name} for {board.title}"
    (packed.folder / report_file).write_bytes(render_report(title, facts, units, packed.warnings))
    manifest = write_manifest(
        packed.folder,
        Manifest(
            schema_version=2,
            bundle_id="",
            version=options.version,
            profile=board.name,
            profile_sha256=profile_sha256(board),
            components=tuple(packed.components),
            files=file_entries(packed.folder, [report_file]),
        ),
    )
    sizes = {"source_bytes": float(source.size_bytes), "bundle_bytes": float(bundle_bytes(packed.folder))}
    for component in manifest.components:
        sizes[f"{component.kind}_bytes"] = float(sum(entry.size_bytes for entry in component.files))
    if options.max_size_mb is not None and sizes["bundle_bytes"] > options.max_size_mb * 1e6:
        raise CheckFailedError(
            f"--max-size {options.max_size_mb:g}: the bundle takes {sizes['bundle_bytes'] / 1e6:.1f} MB; "
            "nothing was written"
        )
    return _report(out, board, plan, sizes, quality, predicted, tuple(packed.warnings))


def _licence(licence: str | None, whose: str, packed: _Packed) -> str:
    if licence is None:
        packed.warnings.append(f"{whose} names no licence")
    return licence or "unknown"


def _summary(plan: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in plan.items() if not isinstance(value, (list, dict))}


def _report(
    out: Path | None,
    board: DeviceProfile,
    plan: Mapping[str, Any],
    sizes: Mapping[str, float],
    quality: Mapping[str, float],
    predicted: Mapping[str, float | None],
    warnings: tuple[str, ...],
) -> ExportReport:
    return ExportReport(out, board.name, plan, sizes, quality, predicted, warnings, 0.0)


def _texts(
    checkpoint: DecoderCheckpoint, files: TokenizerFiles, board: DeviceProfile, options: ExportOptions
) -> Texts:
    tokenizer = Tokenizer.from_str(files.tokenizer_json.decode("utf-8"))
    prefix = [files.bos_token_id] if files.add_bos and files.bos_token_id is not None else []
    calibration = calibration_text() if options.calibration is None else read_text_set(options.calibration)
    quality = _quality_text(options)
    budget = int(_CALIBRATION_WORK / checkpoint.parameters)
    limit = checkpoint.config.context_tokens
    batches = to_token_batches(
        calibration,
        tokenizer,
        prefix,
        max_tokens=max(_MIN_CALIBRATION_TOKENS, min(_MAX_CALIBRATION_TOKENS, budget)),
        sequence_tokens=min(_SEQUENCE_TOKENS, limit),
    )
    context = options.context_tokens or board.export.context_tokens
    checks = to_token_batches(
        quality,
        tokenizer,
        prefix,
        max_tokens=_MAX_QUALITY_TOKENS,
        sequence_tokens=max(2, min(_SEQUENCE_TOKENS, limit, context)),
    )
    return Texts(batches, calibration.sha256, checks, quality.name)


def _quality_text(options: ExportOptions) -> TextSet:
    return probe_text() if options.quality_text is None else read_text_set(options.quality_text)


def _sentences(options: ExportOptions) -> list[str]:
    """Sentence-sized pieces of the quality text, for encoders."""
    lines = [line.strip() for document in _quality_text(options).documents for line in document.splitlines()]
    return [line for line in lines if line][:256]


def _source(checkpoint: DecoderCheckpoint | EncoderCheckpoint, calibration_sha256: str | None) -> Source:
    return Source(
        name=checkpoint.name[:200],
        format=checkpoint.format,
        sha256=checkpoint.digest.sha256,
        size_bytes=checkpoint.digest.size_bytes,
        calibration_sha256=calibration_sha256,
    )


def _predicted(cost: GraphCost, board: DeviceProfile) -> dict[str, float | None]:
    result = predict(cost, board, prompt_tokens=_prompt_tokens(cost), new_tokens=_PREDICTED_NEW_TOKENS)
    return {
        "prefill_tps": result.prefill_tps,
        "decode_tps": result.decode_tps,
        "ttft_ms": result.ttft_ms,
        "peak_rss_mb": result.peak_rss_mb,
        "joules_per_token": result.joules_per_token,
    }


def _prompt_tokens(cost: GraphCost) -> int:
    return max(1, min(_PREDICTED_PROMPT_TOKENS, cost.context_tokens - _PREDICTED_NEW_TOKENS))


def _manifest_prediction(predicted: Mapping[str, float | None]) -> Predicted:
    rounded = {name: None if v is None else float(f"{v:.4g}") for name, v in predicted.items()}
    return Predicted(**rounded)  # type: ignore[arg-type]


def _check_latency(predicted: Mapping[str, float | None], options: ExportOptions) -> None:
    limit, tps = options.max_latency_ms, predicted["decode_tps"]
    if limit is not None and tps is not None and 1e3 / tps > limit:
        raise TargetError(f"--max-latency {limit:g}: {1e3 / tps:.1f} ms a token are predicted on this board")


def _check_quality(quality: Mapping[str, float], options: ExportOptions) -> None:
    if options.min_quality is None:
        return
    name = "top1_agreement" if "top1_agreement" in quality else "mean_cosine"
    if quality[name] < options.min_quality:
        raise CheckFailedError(
            f"--min-quality {options.min_quality:g}: {name} is {quality[name]:.4f}; nothing was written"
        )


def _tool_versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _TOOLS}
