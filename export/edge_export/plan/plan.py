"""The plan: every decision of an export, made before any weight changes. Frozen, printable, deterministic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from edge_export.model.config import DecoderConfig
from edge_export.plan.analysis import Analysis
from edge_export.plan.units import Unit, decoder_units, small_parameters
from edge_export.quantize import BlockFormat
from edge_export.storage.matrices import FloatType
from edge_reasoner.contract.profile import DeviceProfile
from edge_reasoner.errors import InputError, TargetError

Recipe = Literal["auto", "fp32", "fp16", "int8", "int4", "mixed"]
RECIPES: tuple[str, ...] = get_args(Recipe)

STATISTICAL_QUANTIZERS = frozenset({"searched", "gptq"})
#: `auto` promotes units from 4 to 8 bits, best gain per byte first, until the estimated divergence from the
#: unquantized model is at most this (nats per token) …
AUTO_LOSS_TARGET = 0.01
#: … or the weights take this many bits each on average, scales included.
AUTO_BITS_PER_WEIGHT = 6.5
#: An 8-bit step is a 16th of a 4-bit step, and the loss grows with its square.
_LOSS_RATIO_INT8 = 1.0 / 256.0
#: Units that read the residual stream through a norm. Their inputs are the smoother ones, so `int8` gives
#: them larger blocks; `o` and `down` read products with outliers and keep the profile's block size.
_NORMED_KINDS = frozenset({"embed", "gate_up", "head"})
#: What `mixed` keeps at 4 bits: half of the weights, and the least sensitive kind in small models.
_MIXED_INT4_KINDS = frozenset({"gate_up"})
_GQA_HEAD_MULTIPLE = 16


@dataclass(frozen=True)
class UnitPlan:
    """How one unit is stored, and why."""

    unit: Unit
    #: None: as floats of the plan's `dense` type
    format: BlockFormat | None
    quantizer: str | None
    #: estimated divergence at this precision, nats per token; None where it was not estimated
    loss: float | None = None

    @property
    def uses_statistics(self) -> bool:
        """Whether the quantizer looks at calibration inputs."""
        return self.quantizer in STATISTICAL_QUANTIZERS

    def to_dict(self) -> dict[str, Any]:
        """JSON-able row."""
        row: dict[str, Any] = {"unit": self.unit.name, "parameters": self.unit.parameters}
        row["format"] = "float" if self.format is None else self.format.label
        if self.quantizer is not None:
            row["quantizer"] = self.quantizer
        if self.loss is not None:
            row["loss_nats"] = float(f"{self.loss:.4g}")
        return row


@dataclass(frozen=True)
class ExportPlan:
    """Everything that the later stages need to know about precision and shape."""

    recipe: Recipe
    profile: str
    opset: int
    context_tokens: int
    threads: int
    #: storage of matrices that are not quantized, norms and biases
    dense: FloatType
    #: arithmetic and KV cache
    compute: FloatType
    units: tuple[UnitPlan, ...]
    small_parameters: int
    calibration_sha256: str | None

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
        if plan.format is None:
            return plan.unit.parameters * self._dense_width
        fmt, blocks = plan.format, -(-plan.unit.columns // plan.format.block_size)
        row_bytes = blocks * fmt.block_size * fmt.bits // 8 + 4 * blocks
        if not fmt.symmetric:
            row_bytes += -(-blocks * fmt.bits // 8)
        return plan.unit.rows * row_bytes

    def for_unit(self, name: str) -> UnitPlan:
        """The row of that unit."""
        return next(u for u in self.units if u.unit.name == name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, as printed by --dry-run and kept in the manifest."""
        losses = [u.loss for u in self.units if u.loss is not None]
        return {
            "recipe": self.recipe,
            "profile": self.profile,
            "opset": self.opset,
            "context_tokens": self.context_tokens,
            "threads": self.threads,
            "dense": self.dense,
            "compute": self.compute,
            "weight_bytes": self.weight_bytes,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "estimated_loss_nats": float(f"{sum(losses):.4g}") if losses else None,
            "calibration_sha256": self.calibration_sha256,
            "units": [u.to_dict() for u in self.units],
        }


def contrib_operators(config: DecoderConfig, recipe: Recipe) -> frozenset[str]:
    """onnxruntime's own operators that the decoder's graphs use."""
    operators = {"GroupQueryAttention", "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"}
    operators |= {"FusedMatMul"} if recipe in ("fp32", "fp16") else {"GatherBlockQuantized", "MatMulNBits"}
    return frozenset(operators | ({"QuickGelu"} if config.activation == "silu" else set()))


def check_decoder(
    config: DecoderConfig, profile: DeviceProfile, recipe: Recipe, context_tokens: int | None
) -> int:
    """Refuses what the operators cannot take, before any work. Returns the context length in tokens.

    Raises TargetError where the board lacks operators, InputError for shapes and contexts out of range.
    """
    if profile.allowed_ops is not None:
        missing = sorted(contrib_operators(config, recipe) - profile.allowed_ops)
        if missing:
            raise TargetError(
                f"profile {profile.name!r}: its onnxruntime lacks {', '.join(missing)}, which a decoder needs"
            )
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
    if not 16 <= wanted <= config.context_tokens:
        raise InputError(f"--context-tokens {wanted}: allowed: 16 to the model's {config.context_tokens}")
    return wanted


def needs_losses(recipe: Recipe) -> bool:
    """Whether planning needs the backward pass of the analysis."""
    return recipe == "auto"


def needs_importance(recipe: Recipe) -> bool:
    """Whether quantizing needs the forward pass of the analysis."""
    return recipe in ("auto", "int4", "int8", "mixed")


def int4_format(profile: DeviceProfile) -> BlockFormat:
    """The profile's 4-bit format."""
    return BlockFormat(4, profile.export.int4_block_size, profile.export.int4_symmetric)


def plan_decoder(
    config: DecoderConfig,
    profile: DeviceProfile,
    recipe: Recipe,
    context_tokens: int,
    analysis: Analysis | None,
    calibration_sha256: str | None,
    quantizer: str = "gptq",
) -> ExportPlan:
    """Decides every unit's format. `analysis` is needed where `needs_importance` says so."""
    units = tuple(decoder_units(config))
    dense: FloatType = "float16" if recipe == "fp16" else "float32"
    gpu = any(a.kind == "gpu" for a in profile.accelerators)
    return ExportPlan(
        recipe=recipe,
        profile=profile.name,
        opset=profile.max_opset,
        context_tokens=context_tokens,
        threads=profile.default_threads,
        dense=dense,
        # CPUs have no float16 kernels for most operators: there fp16 is a storage format only.
        compute="float16" if recipe == "fp16" and gpu else "float32",
        units=_unit_plans(units, profile, recipe, analysis, quantizer),
        small_parameters=small_parameters(config),
        calibration_sha256=calibration_sha256 if needs_importance(recipe) else None,
    )


def _unit_plans(
    units: Sequence[Unit], profile: DeviceProfile, recipe: Recipe, analysis: Analysis | None, quantizer: str
) -> tuple[UnitPlan, ...]:
    if recipe in ("fp32", "fp16"):
        return tuple(UnitPlan(unit, None, None) for unit in units)
    int4, int8 = int4_format(profile), _int8_formats(profile)
    if recipe == "int8":
        return tuple(UnitPlan(unit, int8(unit), quantizer) for unit in units)
    if recipe == "int4":
        return tuple(UnitPlan(unit, int4, quantizer) for unit in units)
    if recipe == "mixed":
        return tuple(
            UnitPlan(unit, int4, quantizer)
            if unit.kind in _MIXED_INT4_KINDS
            else UnitPlan(unit, int8(unit), "rtn")
            for unit in units
        )
    assert analysis is not None, "auto needs the analysis"
    return _auto(units, int4, int8, analysis, quantizer)


class _int8_formats:  # noqa: N801 - a closure with a name
    """8-bit format of a unit: the profile's block, doubled where inputs are smooth."""

    def __init__(self, profile: DeviceProfile) -> None:
        self._block, self._symmetric = profile.export.int8_block_size, profile.export.int8_symmetric

    def __call__(self, unit: Unit) -> BlockFormat:
        block = self._block * 2 if unit.kind in _NORMED_KINDS else self._block
        return BlockFormat(8, block, self._symmetric)


def _auto(
    units: Sequence[Unit], int4: BlockFormat, int8: _int8_formats, analysis: Analysis, quantizer: str
) -> tuple[UnitPlan, ...]:
    """All units at 4 bits, then one after another to 8: the largest loss removed per added byte first."""
    losses = dict(analysis.int4_losses)
    # An embedding that is only gathered costs a row per token: keep it at 8 bits, its loss was not measured.
    wide = {unit.name for unit in units if unit.kind == "embed"}
    total = sum(unit.parameters for unit in units)
    bits = sum(u.parameters * (int8(u) if u.name in wide else int4).bits_per_weight for u in units)
    left = sum(losses.values())

    def gain(unit: Unit) -> float:
        added = unit.parameters * (int8(unit).bits_per_weight - int4.bits_per_weight)
        return losses[unit.name] / added

    for unit in sorted((u for u in units if u.name not in wide), key=lambda u: (-gain(u), u.name)):
        if left <= AUTO_LOSS_TARGET:
            break
        added = unit.parameters * (int8(unit).bits_per_weight - int4.bits_per_weight)
        if (bits + added) / total > AUTO_BITS_PER_WEIGHT:
            continue
        bits += added
        left -= losses[unit.name] * (1 - _LOSS_RATIO_INT8)
        wide.add(unit.name)
    return tuple(
        UnitPlan(unit, int8(unit), "rtn", _scaled(losses.get(unit.name)))
        if unit.name in wide
        else UnitPlan(unit, int4, quantizer, losses[unit.name])
        for unit in units
    )


def _scaled(loss: float | None) -> float | None:
    return None if loss is None else loss * _LOSS_RATIO_INT8
