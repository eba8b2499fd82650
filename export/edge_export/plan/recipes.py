"""Recipes: which format every matrix gets. A new one is one row of `RECIPES`, with its rules.

Everything that is said about recipes elsewhere (options, help, error texts, tolerances) is read from the
rows. The table needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from edge_export.quantize import quantizer_row
from edge_export.quantize.formats import BlockFormat, FloatType, MatrixFormat

if TYPE_CHECKING:
    from edge_export.plan.analysis import Analysis
    from edge_export.plan.units import Unit
    from edge_reasoner.contract.profile import DeviceProfile
    from edge_reasoner.contract.profile.schema import WeightPrecision

DEFAULT_RECIPE: Final = "auto"
#: `auto` promotes units from 4 to 8 bits, best gain per byte first, until the estimated divergence from the
#: unquantized model is at most this (nats per token) …
AUTO_LOSS_TARGET: Final = 0.01
#: … or the weights take this many bits each on average, scales included.
AUTO_BITS_PER_WEIGHT: Final = 6.5
#: An 8-bit step is a 16th of a 4-bit step, and the loss grows with its square.
_LOSS_RATIO_INT8: Final = 1.0 / 256.0
#: Where a recipe decides between 4 and 8 bits, 8 are so exact that plain rounding does.
_WIDE_QUANTIZER: Final = "rtn"
#: Units that read the residual stream through a norm. Their inputs are the smoother ones, so `int8` gives
#: them larger blocks; `o` and `down` read products with outliers and keep the profile's block size.
_NORMED_KINDS: Final = frozenset({"embed", "gate_up", "head"})
#: What `mixed` keeps at 4 bits: half of the weights, and the least sensitive kind in small models.
_MIXED_INT4_KINDS: Final = frozenset({"gate_up"})
_ENCODER_INT8_BLOCKS: Final = (128, 64, 32, 16)
_ENCODER_INT4_BLOCK: Final = 32
#: Arithmetic in float32 on the stored weights, and in float16: relative RMS error of a position's logits.
EXACT_LOGITS: Final = 2e-3
_HALF_LOGITS, _ROUNDED_LOGITS = 2e-2, 0.2
#: As 1 − cosine of an encoder's embedding. Rounded: each matrix's inputs have 8 bits too.
_EXACT_COSINE, _ROUNDED_COSINE = 1e-5, 5e-3


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
        return self.quantizer is not None and quantizer_row(self.quantizer).uses_statistics

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
class BoardFormats:
    """The block formats that a board's profile asks for."""

    int4: BlockFormat
    int8_block_size: int
    int8_symmetric: bool

    @classmethod
    def of(cls, profile: DeviceProfile) -> BoardFormats:
        """Those of the profile's `[export]` table."""
        export = profile.export
        int4 = BlockFormat(4, export.int4_block_size, export.int4_symmetric)
        return cls(int4, export.int8_block_size, export.int8_symmetric)

    def int8(self, unit: Unit) -> BlockFormat:
        """8-bit format of a unit: the profile's block, doubled where inputs are smooth."""
        block = self.int8_block_size * 2 if unit.kind in _NORMED_KINDS else self.int8_block_size
        return BlockFormat(8, block, self.int8_symmetric)


#: (units, the board's formats, what calibration text said, the quantizer's name) → a row for each unit
DecoderRule = Callable[["Sequence[Unit]", BoardFormats, "Analysis | None", str], tuple[UnitPlan, ...]]
#: (matrix kind: word, qkv, o, up, down; its columns) → format
EncoderRule = Callable[[str, int], MatrixFormat]


@dataclass(frozen=True)
class Recipe:
    """One recipe: how decoders and encoders are stored, and what follows for the other stages."""

    name: str
    #: for help texts, without a full stop
    summary: str
    #: what the board has to run, in the words of a profile's `[[precisions]]`
    weights: WeightPrecision
    decoder: DecoderRule
    #: None: decided from measurements (`plan.encoder`)
    encoder: EncoderRule | None
    #: matrices are stored in blocks of integers
    quantized: bool
    #: a decoder's matrices that are not quantized, its norms and biases
    dense: FloatType = "float32"
    #: an encoder's position and token type tables: under 1 % of the weights, exact enough as float16
    encoder_tables: FloatType = "float16"
    #: an encoder's norms and biases
    encoder_vectors: FloatType = "float32"
    #: planning a decoder takes the analysis' backward pass
    needs_losses: bool = False
    #: recipes taken instead, in this order, where the board does not run `weights`
    instead: tuple[str, ...] = ()
    #: how far a graph may be from torch on the same weights: logits of decoders, 1 − cosine of encoders
    logit_tolerance: float = _ROUNDED_LOGITS
    cosine_tolerance: float = _ROUNDED_COSINE


def smallest_int8(columns: int) -> BlockFormat:
    """An encoder's 8-bit format: the block that stores a row, padded to whole blocks, in the fewest bytes."""
    size = min(_ENCODER_INT8_BLOCKS, key=lambda block: -(-columns // block) * (block + 4))
    return BlockFormat(8, size, symmetric=True)


def encoder_int4() -> BlockFormat:
    """An encoder's 4-bit format."""
    return BlockFormat(4, _ENCODER_INT4_BLOCK, symmetric=False)


def _floats(
    units: Sequence[Unit], formats: BoardFormats, analysis: Analysis | None, quantizer: str
) -> tuple[UnitPlan, ...]:
    return tuple(UnitPlan(unit, None, None) for unit in units)


def _int8(
    units: Sequence[Unit], formats: BoardFormats, analysis: Analysis | None, quantizer: str
) -> tuple[UnitPlan, ...]:
    return tuple(UnitPlan(unit, formats.int8(unit), quantizer) for unit in units)


def _int4(
    units: Sequence[Unit], formats: BoardFormats, analysis: Analysis | None, quantizer: str
) -> tuple[UnitPlan, ...]:
    return tuple(UnitPlan(unit, formats.int4, quantizer) for unit in units)


def _mixed(
    units: Sequence[Unit], formats: BoardFormats, analysis: Analysis | None, quantizer: str
) -> tuple[UnitPlan, ...]:
    return tuple(
        UnitPlan(unit, formats.int4, quantizer)
        if unit.kind in _MIXED_INT4_KINDS
        else UnitPlan(unit, formats.int8(unit), _WIDE_QUANTIZER)
        for unit in units
    )


def _auto(
    units: Sequence[Unit], formats: BoardFormats, analysis: Analysis | None, quantizer: str
) -> tuple[UnitPlan, ...]:
    """All units at 4 bits, then one after another to 8: the largest loss removed per added byte first."""
    assert analysis is not None, "auto needs the analysis"
    int4, int8 = formats.int4, formats.int8
    losses = dict(analysis.int4_losses)
    # An embedding that is only gathered costs a row per token: keep it at 8 bits, its loss was not measured.
    wide = {unit.name for unit in units if unit.kind == "embed"}
    total = sum(unit.parameters for unit in units)
    bits = sum(u.parameters * (int8(u) if u.name in wide else int4).bits_per_weight for u in units)
    left = sum(losses.values())

    def added_bits(unit: Unit) -> float:
        return unit.parameters * (int8(unit).bits_per_weight - int4.bits_per_weight)

    ranked = sorted(
        (unit for unit in units if unit.name not in wide),
        key=lambda unit: (-losses[unit.name] / added_bits(unit), unit.name),
    )
    for unit in ranked:
        if left <= AUTO_LOSS_TARGET:
            break
        if (bits + added_bits(unit)) / total > AUTO_BITS_PER_WEIGHT:
            continue
        bits += added_bits(unit)
        left -= losses[unit.name] * (1 - _LOSS_RATIO_INT8)
        wide.add(unit.name)
    return tuple(
        UnitPlan(unit, int8(unit), _WIDE_QUANTIZER, _scaled(losses.get(unit.name)))
        if unit.name in wide
        else UnitPlan(unit, int4, quantizer, losses[unit.name])
        for unit in units
    )


def _scaled(loss: float | None) -> float | None:
    return None if loss is None else loss * _LOSS_RATIO_INT8


def _float_recipe(dtype: FloatType, name: str, summary: str, weights: WeightPrecision) -> Recipe:
    return Recipe(
        name,
        summary,
        weights,
        _floats,
        lambda kind, columns: dtype,
        quantized=False,
        dense=dtype,
        encoder_tables=dtype,
        encoder_vectors=dtype,
        logit_tolerance=EXACT_LOGITS if dtype == "float32" else _HALF_LOGITS,
        cosine_tolerance=_EXACT_COSINE,
    )


_ROWS: Final = (
    Recipe(
        "auto",
        "4 and 8 bits by measured sensitivity, so that small models keep their quality",
        "mixed",
        _auto,
        None,
        quantized=True,
        needs_losses=True,
        instead=("int8", "int4", "fp16", "fp32"),
    ),
    _float_recipe("float32", "fp32", "weights as they are", "fp32"),
    _float_recipe("float16", "fp16", "half the bytes; a CPU widens them when it loads", "fp16"),
    Recipe("int8", "8 bits", "int8", _int8, lambda kind, columns: smallest_int8(columns), quantized=True),
    Recipe("int4", "4 bits", "int4", _int4, lambda kind, columns: encoder_int4(), quantized=True),
    Recipe(
        "mixed",
        "the least sensitive half at 4 bits, the rest at 8",
        "mixed",
        _mixed,
        # Words are half of a small encoder, and rounding them costs it far less than rounding the layers
        # (benchmarks/encoder_quality.py): nearly as exact as int8 at four fifths of its size.
        lambda kind, columns: encoder_int4() if kind == "word" else smallest_int8(columns),
        quantized=True,
    ),
)
RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.name: recipe for recipe in _ROWS})
