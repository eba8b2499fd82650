"""The plan: every decision of an export, made before any weight changes. Frozen, printable, deterministic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from edge_export.model.config import DecoderConfig
from edge_export.plan.analysis import Analysis
from edge_export.plan.recipes import RECIPES, BoardFormats, UnitPlan
from edge_export.plan.target import MIN_CONTEXT_TOKENS, BoardPlan, Target, choose_target
from edge_export.plan.units import decoder_units, small_parameters
from edge_export.quantize import DEFAULT_QUANTIZER, quantizer_row
from edge_export.quantize.base import InputStatistics
from edge_export.quantize.formats import FloatType, stored_bytes
from edge_reasoner.contract.profile import DeviceProfile
from edge_reasoner.errors import InputError

_GQA_HEAD_MULTIPLE = 16


@dataclass(frozen=True)
class ExportPlan(BoardPlan):
    """Everything that the later stages need to know about precision and shape."""

    context_tokens: int
    threads: int
    #: storage of matrices that are not quantized, norms and biases
    dense: FloatType
    compute: FloatType
    kv_dtype: FloatType
    units: tuple[UnitPlan, ...]
    small_parameters: int
    calibration_sha256: str | None
    #: what the board's owner should know, a sentence each
    notes: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stored weights."""
        return sum(map(self.unit_bytes, self.units)) + self._dense_width * self.small_parameters

    @property
    def bits_per_weight(self) -> float:
        """Average over all weights."""
        return 8 * self.weight_bytes / (sum(u.unit.parameters for u in self.units) + self.small_parameters)

    @property
    def _dense_width(self) -> int:
        return 2 if self.dense == "float16" else 4

    def unit_bytes(self, plan: UnitPlan) -> int:
        """Bytes that one of its units takes."""
        return stored_bytes(plan.format or self.dense, plan.unit.rows, plan.unit.columns)

    def for_unit(self, name: str) -> UnitPlan:
        """The row of that unit."""
        return next(u for u in self.units if u.unit.name == name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, as printed by --dry-run and kept in the manifest."""
        losses = [u.loss for u in self.units if u.loss is not None]
        return {
            **super().to_dict(),
            "context_tokens": self.context_tokens,
            "threads": self.threads,
            "dense": self.dense,
            "compute": self.compute,
            "kv_dtype": self.kv_dtype,
            "weight_bytes": self.weight_bytes,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "estimated_loss_nats": float(f"{sum(losses):.4g}") if losses else None,
            "calibration_sha256": self.calibration_sha256,
            "notes": list(self.notes),
            "units": [u.to_dict() for u in self.units],
        }


def contrib_operators(config: DecoderConfig, quantized: bool) -> frozenset[str]:
    """onnxruntime's own operators that the decoder's graphs use."""
    operators = {"GroupQueryAttention", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"}
    operators |= {"GatherBlockQuantized", "MatMulNBits"} if quantized else {"FusedMatMul"}
    return frozenset(operators | ({"QuickGelu"} if config.activation == "silu" else set()))


def decoder_target(config: DecoderConfig, profile: DeviceProfile, recipe: str) -> Target:
    """Where on the board the decoder runs, and by which recipe. Raises TargetError as `choose_target`."""
    parameters = sum(unit.parameters for unit in decoder_units(config)) + small_parameters(config)
    operators = {quantized: contrib_operators(config, quantized) for quantized in (False, True)}
    return choose_target(profile, "causal-lm", recipe, operators=operators, parameters=parameters)


def check_decoder(
    config: DecoderConfig, profile: DeviceProfile, recipe: str, context_tokens: int | None
) -> int:
    """Refuses what board or operators cannot take, before any work. Returns the context length in tokens.

    Raises TargetError for what the board rules out, InputError for shapes and contexts out of range.
    """
    decoder_target(config, profile, recipe)
    for index, layer in enumerate(config.layers):
        if layer.head_dim % _GQA_HEAD_MULTIPLE:
            raise InputError(
                f"layer {index}: head_dim {layer.head_dim}: GroupQueryAttention takes multiples of "
                f"{_GQA_HEAD_MULTIPLE}"
            )
        if layer.num_heads % layer.num_kv_heads:
            raise InputError(
                f"layer {index}: {layer.num_heads} heads are no multiple of {layer.num_kv_heads}"
            )
    wanted = context_tokens or min(profile.export.context_tokens, config.context_tokens)
    if not MIN_CONTEXT_TOKENS <= wanted <= config.context_tokens:
        raise InputError(
            f"context_tokens={wanted}: allowed: {MIN_CONTEXT_TOKENS} to the model's {config.context_tokens}"
        )
    return wanted


def needs_losses(recipe: str) -> bool:
    """Whether planning needs the backward pass of the analysis."""
    return RECIPES[recipe].needs_losses


def needs_statistics(recipe: str, quantizer: str) -> bool:
    """Whether planning or quantizing looks at calibration text."""
    row = RECIPES[recipe]
    return row.needs_losses or (row.quantized and quantizer_row(quantizer).uses_statistics)


def plan_decoder(
    config: DecoderConfig,
    profile: DeviceProfile,
    recipe: str,
    context_tokens: int,
    analysis: Analysis | None,
    calibration_sha256: str | None,
    quantizer: str = DEFAULT_QUANTIZER,
) -> ExportPlan:
    """Decides every unit's format. `analysis` is needed where `needs_losses` says so.

    Raises TargetError as `decoder_target`.
    """
    target = decoder_target(config, profile, recipe)
    row = target.recipe
    used = needs_statistics(row.name, quantizer)
    return ExportPlan(
        recipe=row.name,
        profile=profile.name,
        processor=target.processor,
        execution_provider=target.execution_provider,
        opset=profile.max_opset,
        context_tokens=context_tokens,
        threads=profile.default_threads,
        dense=row.dense,
        compute=target.compute,
        kv_dtype=target.kv_dtype,
        units=row.decoder(tuple(decoder_units(config)), BoardFormats.of(profile), analysis, quantizer),
        small_parameters=small_parameters(config),
        calibration_sha256=calibration_sha256 if used else None,
        notes=target.notes,
    )


def smallest_plan(
    config: DecoderConfig, profile: DeviceProfile, recipe: str, context_tokens: int
) -> ExportPlan:
    """The plan with the fewest bytes that the recipe may come to, before anything is measured."""
    harmless = dict.fromkeys((unit.name for unit in decoder_units(config)), 0.0)
    analysis = Analysis(0, {}, InputStatistics(torch.ones(0)), harmless)
    return plan_decoder(config, profile, recipe, context_tokens, analysis, None)
