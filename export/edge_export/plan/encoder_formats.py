"""How an encoder's weights are stored under each recipe: a pure function of its shape.

Integer recipes store every matrix in blocks along its input dimension: int8 all at 8 bits, int4 all at 4,
mixed the word embeddings at 4 and the layers at 8. Words are half of a small encoder, and rounding them to
4 bits costs it far less than rounding the layers (benchmarks/encoder_quality.py): mixed is nearly as exact
as int8 at four fifths of its size.

At 8 bits the scales decide whether the result is a quarter of float32 (block 32 would add an eighth to it),
so the block is the one that needs the fewest bytes for the matrix at hand, up to 128. At 4 bits the block
is 32 with zero points and searched scales.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, get_args

from edge_export.model.config import EncoderConfig
from edge_export.quantize import BlockFormat
from edge_export.storage.matrices import FloatType
from edge_reasoner.errors import InputError

EncoderRecipe = Literal["fp32", "fp16", "int8", "mixed", "int4"]
MatrixFormat = BlockFormat | FloatType

ENCODER_RECIPES: Final[tuple[EncoderRecipe, ...]] = get_args(EncoderRecipe)
#: Matrix kinds, and the layer-local tensors that each consists of, in the graph's order.
LAYER_MATRICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {"qkv": ("q", "k", "v"), "o": ("o",), "up": ("up",), "down": ("down",)}
)
_NORMS: Final = ("attn_norm", "mlp_norm")
_INT8_BLOCKS: Final = (128, 64, 32, 16)
_INT4_BLOCK: Final = 32


@dataclass(frozen=True)
class EncoderFormats:
    """`matrices` by kind (word, qkv, o, up, down); `tables` are the position and token type embeddings,
    `vectors` biases and norms."""

    recipe: EncoderRecipe
    matrices: Mapping[str, MatrixFormat]
    tables: FloatType
    vectors: FloatType

    def of(self, name: str) -> MatrixFormat:
        """The format of a graph weight (`encoder_weights`) or of a canonical tensor."""
        part = name.removesuffix(".weight")
        if part == "embed.word":
            return self.matrices["word"]
        if part in ("embed.position", "embed.token_type"):
            return self.tables
        kind = part.rpartition(".")[2]
        parts = {tensor: matrix for matrix, tensors in LAYER_MATRICES.items() for tensor in tensors}
        return self.matrices.get(parts.get(kind, kind), self.vectors)


def encoder_formats(config: EncoderConfig, recipe: str) -> EncoderFormats:
    """The formats of every weight. Raises InputError for an unknown recipe."""
    floats: dict[str, tuple[FloatType, FloatType]] = {
        "fp32": ("float32", "float32"),
        "fp16": ("float16", "float16"),
        # Tables and vectors are under 1 % of the weights; float16 tables are exact enough to cost nothing.
        "int8": ("float16", "float32"),
        "mixed": ("float16", "float32"),
        "int4": ("float16", "float32"),
    }
    checked = next((known for known in ENCODER_RECIPES if known == recipe), None)
    if checked is None:
        raise InputError(f"encoder recipe {recipe[:40]!r}; allowed: {', '.join(ENCODER_RECIPES)}")
    tables, vectors = floats[checked]
    columns = {"word": config.hidden_size, **dict.fromkeys(LAYER_MATRICES, config.hidden_size)}
    columns["down"] = config.ffn_width
    matrices: dict[str, MatrixFormat] = {}
    for kind, width in columns.items():
        if checked in ("fp32", "fp16"):
            matrices[kind] = tables
        elif checked == "int8" or (checked == "mixed" and kind != "word"):
            matrices[kind] = BlockFormat(8, _smallest_block(width), symmetric=True)
        else:
            matrices[kind] = BlockFormat(4, _INT4_BLOCK, symmetric=False)
    return EncoderFormats(checked, MappingProxyType(matrices), tables, vectors)


def _smallest_block(columns: int) -> int:
    """The block size that stores a row of 8-bit codes, padded to whole blocks, in the fewest bytes."""
    return min(_INT8_BLOCKS, key=lambda size: -(-columns // size) * (size + 4))


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
