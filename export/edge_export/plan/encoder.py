"""The encoder's plan: how every weight is stored, and what `auto` decides it by.

Integer recipes store every matrix in blocks along its input dimension. At 8 bits the scales decide whether
the result is a quarter of float32 (block 32 would add an eighth to it), so the block is the one that needs
the fewest bytes for the matrix at hand, up to 128. At 4 bits the block is 32 with zero points and searched
scales.

`auto` begins with 8 bits everywhere, whose loss is measured as a whole, and gives 4 to one matrix after
another, the least measured loss per byte saved first, while the sum stays within `AUTO_LOSS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from edge_export.model.config import EncoderConfig
from edge_export.model.encoder import encoder_parameter_count, encoder_tensor_shapes
from edge_export.plan.recipes import RECIPES, Recipe, encoder_int4, smallest_int8
from edge_export.plan.target import BoardPlan, Target, choose_target
from edge_export.quantize.formats import BlockFormat, FloatType, MatrixFormat, format_label, stored_bytes
from edge_reasoner.contract.profile import DeviceProfile
from edge_reasoner.errors import TargetError

#: Most loss, 1 − cosine on average, that `auto` lets rounded weights cause. The device's 8-bit arithmetic
#: adds about 6e-4 to it with MiniLM (benchmarks/encoder_quality.py): a mean cosine of 0.999 is left.
AUTO_LOSS: Final = 3e-4
#: Matrix kinds, and the layer-local tensors that each consists of, in the graph's order.
LAYER_MATRICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"qkv": ("q", "k", "v"), "o": ("o",), "up": ("up",), "down": ("down",)}
)
_NORMS: Final = ("attn_norm", "mlp_norm")
#: `com.microsoft` operators beside those that read the weights.
_FUSED_OPS: Final = frozenset({"BiasGelu", "MultiHeadAttention", "SkipLayerNormalization"})
_BLOCK_OPS: Final = frozenset({"GatherBlockQuantized", "MatMulNBits"})
_FLOAT_OPS: Final = frozenset({"FusedMatMul"})
#: `Shape` with bounds
_MINIMUM_OPSET: Final = 15


@dataclass(frozen=True)
class EncoderAnalysis:
    """What calibration sentences say: loss is 1 − cosine to the float32 embeddings, on average."""

    sentences: int
    #: all matrices at 8 bits
    int8_loss: float
    #: matrix name (`embed.word`, `layers.3.qkv`) → loss with that one matrix at 4 bits, all else in float32
    int4_losses: Mapping[str, float]


@dataclass(frozen=True)
class EncoderWeight:
    """One weight of the graph, and how it is stored."""

    #: as in `encoder_weights`
    name: str
    #: the canonical tensors that it stacks
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    format: MatrixFormat
    #: measured loss at this format; None where nothing was measured
    loss: float | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes stored."""
        rows, columns = self.shape if len(self.shape) == 2 else (1, self.shape[0])
        return stored_bytes(self.format, rows, columns)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able row of a matrix."""
        row: dict[str, Any] = {
            "name": self.name.removesuffix(".weight"),
            "rows": self.shape[0],
            "columns": self.shape[1],
            "format": format_label(self.format),
            "bytes": self.size_bytes,
        }
        return row if self.loss is None else {**row, "loss": float(f"{self.loss:.4g}")}


@dataclass(frozen=True)
class EncoderPlan(BoardPlan):
    """Everything that the later stages need to know about an encoder's precision."""

    #: in the order of use
    weights: tuple[EncoderWeight, ...]
    #: estimated 1 − cosine of rounded weights, on average; None where it was not measured
    loss: float | None
    calibration_sha256: str | None
    notes: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all stored weights, without alignment gaps."""
        return sum(weight.size_bytes for weight in self.weights)

    @property
    def quantized(self) -> bool:
        """Whether any matrix is stored in blocks."""
        return any(isinstance(weight.format, BlockFormat) for weight in self.weights)

    @property
    def widened(self) -> bool:
        """Whether matrices are stored as float16, which a CPU widens when it loads them."""
        return any(
            weight.format == "float16" for weight in self.weights if matrix_kind(weight.name) is not None
        )

    @property
    def cosine_tolerance(self) -> float:
        """How far, in 1 − cosine, a kernel may be from torch on the same stored weights."""
        return RECIPES[self.recipe].cosine_tolerance

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, as printed by --dry-run and kept in the manifest."""
        return {
            **super().to_dict(),
            "weight_bytes": self.weight_bytes,
            "estimated_loss": None if self.loss is None else float(f"{self.loss:.4g}"),
            "calibration_sha256": self.calibration_sha256,
            "notes": list(self.notes),
            "matrices": [weight.to_dict() for weight in self.weights if len(weight.shape) == 2],
        }


def encoder_contrib_ops(block_quantized: bool) -> frozenset[str]:
    """The `com.microsoft` operators that an encoder's graph consists of."""
    return _FUSED_OPS | (_BLOCK_OPS if block_quantized else _FLOAT_OPS)


def encoder_target(config: EncoderConfig, profile: DeviceProfile, recipe: str) -> Target:
    """Where on the board the encoder runs, and by which recipe. Raises TargetError as `choose_target`."""
    operators = {quantized: encoder_contrib_ops(quantized) for quantized in (False, True)}
    target = choose_target(
        profile, "encoder", recipe, operators=operators, parameters=encoder_parameter_count(config)
    )
    if profile.max_opset < _MINIMUM_OPSET:
        raise TargetError(
            f"profile {profile.name!r}: export_opset {profile.max_opset}; an encoder needs {_MINIMUM_OPSET}"
        )
    return target


def quantizer_of(fmt: BlockFormat) -> str:
    """How a matrix is quantized: searching for scales pays at 4 bits; at 8 no one downstream could tell."""
    return "searched" if fmt.bits == 4 else "rtn"


def needs_analysis(recipe: Recipe) -> bool:
    """Whether planning an encoder by that recipe needs an `EncoderAnalysis`."""
    return recipe.encoder is None


def plan_encoder(
    config: EncoderConfig,
    profile: DeviceProfile,
    recipe: str,
    analysis: EncoderAnalysis | None = None,
    calibration_sha256: str | None = None,
    limit_bytes: float | None = None,
) -> EncoderPlan:
    """Decides every weight's format, from shapes and measurements alone.

    Weights above `limit_bytes` make `auto` narrow more matrices than their loss alone would let it. Raises
    TargetError as `encoder_target`.
    """
    target = encoder_target(config, profile, recipe)
    row = target.recipe
    weights = tuple(_planned(config, row))
    loss = None
    if needs_analysis(row):
        assert analysis is not None, "auto needs the analysis"
        weights, loss = _auto(weights, analysis, limit_bytes)
    return EncoderPlan(
        recipe=row.name,
        profile=profile.name,
        processor=target.processor,
        execution_provider=target.execution_provider,
        opset=profile.max_opset,
        weights=weights,
        loss=loss,
        calibration_sha256=calibration_sha256 if needs_analysis(row) else None,
        notes=target.notes,
    )


def smallest_encoder_plan(config: EncoderConfig, profile: DeviceProfile, recipe: str) -> EncoderPlan:
    """The plan with the fewest bytes that the recipe may come to, before anything is measured."""
    row = encoder_target(config, profile, recipe).recipe
    if not needs_analysis(row):
        return plan_encoder(config, profile, recipe)
    losses = {weight.name.removesuffix(".weight"): 0.0 for weight in _planned(config, row)}
    return plan_encoder(config, profile, recipe, EncoderAnalysis(0, 0.0, losses))


def encoder_weights(config: EncoderConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Every weight of the graph → the canonical tensors it stacks, in the order of use.

    Matrices keep their tensor's name, except that q, k and v are one: `layers.{i}.qkv.weight|bias`.
    """
    for table in ("word", "position", "token_type"):
        yield f"embed.{table}.weight", (f"embed.{table}.weight",)
    yield "embed.norm.weight", ("embed.norm.weight",)
    yield "embed.norm.bias", ("embed.norm.bias",)
    for index in range(config.num_layers):
        at = f"layers.{index}"
        for kind, parts in {**LAYER_MATRICES, **{norm: (norm,) for norm in _NORMS}}.items():
            for sort in ("weight", "bias"):
                yield f"{at}.{kind}.{sort}", tuple(f"{at}.{part}.{sort}" for part in parts)


def matrix_kind(name: str) -> str | None:
    """word, qkv, o, up or down, of a graph weight that recipes decide about; else None."""
    part = name.removesuffix(".weight")
    if part == "embed.word":
        return "word"
    kind = part.rpartition(".")[2]
    return kind if name.endswith(".weight") and kind in LAYER_MATRICES else None


def _planned(config: EncoderConfig, recipe: Recipe) -> Iterator[EncoderWeight]:
    """Every weight in the recipe's formats; where it has no rule, matrices at 8 bits."""
    shapes = encoder_tensor_shapes(config)
    rule = recipe.encoder or (lambda kind, columns: smallest_int8(columns))
    for name, tensors in encoder_weights(config):
        rows = sum(shapes[tensor][0] for tensor in tensors)
        shape = (rows, *shapes[tensors[0]][1:])
        kind = matrix_kind(name)
        fmt: MatrixFormat
        if kind is not None:
            fmt = rule(kind, shape[1])
        else:
            table: FloatType = recipe.encoder_tables
            fmt = table if len(shape) == 2 else recipe.encoder_vectors
        yield EncoderWeight(name, tensors, shape, fmt)


def _auto(
    weights: tuple[EncoderWeight, ...], analysis: EncoderAnalysis, limit_bytes: float | None
) -> tuple[tuple[EncoderWeight, ...], float]:
    """8 bits, and 4 where that costs least for what it saves; and the estimated loss."""
    total = analysis.int8_loss
    excess_bytes = sum(weight.size_bytes for weight in weights) - (limit_bytes or float("inf"))
    narrow: dict[str, EncoderWeight] = {}
    candidates = []
    for weight in weights:
        if matrix_kind(weight.name) is not None:
            loss = max(0.0, analysis.int4_losses[weight.name.removesuffix(".weight")])
            small = replace(weight, format=encoder_int4(), loss=loss)
            saved = weight.size_bytes - small.size_bytes
            if saved > 0:
                candidates.append((loss / saved, small.name, small, loss, saved))
    for _, name, small, loss, saved in sorted(candidates, key=lambda row: row[:2]):
        if total + loss <= AUTO_LOSS or excess_bytes > 0:
            total += loss
            excess_bytes -= saved
            narrow[name] = small
    return tuple(narrow.get(weight.name, weight) for weight in weights), total
