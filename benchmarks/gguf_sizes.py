"""Bytes of llama.cpp's quantized files, computed from a model's public shape: no file is needed.

Each tensor's type follows llama.cpp's mixture for the format (`llama_tensor_get_type`): the head, and a tied
embedding, at Q6_K; for Q4_K_M the value and down projections of "more bits" layers at Q6_K; for Q2_K values
at Q4_K (grouped-query ratio ≥ 4) or Q3_K, attention output and down projections at Q3_K. K-types need rows
that are multiples of 256; others fall back (Q2_K, Q3_K → IQ4_NL, Q4_K → Q5_0, Q6_K → Q8_0), which is why
small models with 576 or 896 columns are larger than their format's name suggests. Norms and biases are
float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edge_reasoner.contract.profile.cost import GraphCost

#: bits per weight of ggml's block formats, scales included
BITS = {
    "F32": 32.0, "F16": 16.0, "Q8_0": 8.5, "Q6_K": 6.5625, "Q5_0": 5.5, "Q5_K": 5.5, "Q4_1": 5.0, "Q4_K": 4.5,
    "Q4_0": 4.5, "IQ4_NL": 4.5, "Q3_K": 3.4375, "Q2_K": 2.625, "W8": 8.0,
}  # fmt: skip
_FALLBACK = {"Q2_K": "IQ4_NL", "Q3_K": "IQ4_NL", "Q4_K": "Q5_0", "Q6_K": "Q8_0"}


@dataclass(frozen=True)
class Shape:
    """A Llama-like decoder, from its public config.json."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool
    qkv_bias: bool = False


SHAPES = {
    "SmolLM-135M": Shape(576, 30, 9, 3, 64, 1536, 49152, True),
    "SmolLM2-135M": Shape(576, 30, 9, 3, 64, 1536, 49152, True),
    "Qwen2-0.5B": Shape(896, 24, 14, 2, 64, 4864, 151936, True, True),
    "Qwen2.5-0.5B": Shape(896, 24, 14, 2, 64, 4864, 151936, True, True),
    "Qwen2.5-1.5B": Shape(1536, 28, 12, 2, 128, 8960, 151936, True, True),
    "Llama-3.2-1B": Shape(2048, 16, 32, 8, 64, 8192, 128256, True),
    "TinyLlama-1.1B": Shape(2048, 22, 32, 4, 64, 5632, 32000, False),
    "Llama-2-7B": Shape(4096, 32, 32, 32, 128, 11008, 32000, False),
}


def _matrices(shape: Shape) -> Iterator[tuple[str, int, int, int]]:
    """(role, layer, columns, rows) of every matrix."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in range(shape.layers):
        yield "q", layer, shape.hidden, q
        yield "k", layer, shape.hidden, kv
        yield "v", layer, shape.hidden, kv
        yield "o", layer, q, shape.hidden
        yield "gate", layer, shape.hidden, shape.ffn
        yield "up", layer, shape.hidden, shape.ffn
        yield "down", layer, shape.ffn, shape.hidden
    yield "head", 0, shape.hidden, shape.vocab
    if not shape.tied:
        yield "embedding", 0, shape.hidden, shape.vocab


def _more_bits(layer: int, layers: int) -> bool:
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def tensor_type(shape: Shape, name: str, role: str, layer: int, columns: int) -> str:
    """ggml type of one matrix in a file of format `name`."""
    kind = {"Q4_K_M": "Q4_K"}.get(name, name)
    if role == "head":
        kind = kind if name in ("F32", "F16", "Q8_0", "W8") else "Q6_K"
    elif name == "Q4_K_M" and role in ("v", "down") and _more_bits(layer, shape.layers):
        kind = "Q6_K"
    elif name == "Q2_K" and role == "v":
        kind = "Q4_K" if shape.heads // shape.kv_heads >= 4 else "Q3_K"
    elif name == "Q2_K" and role in ("o", "down"):
        kind = "Q3_K"
    return _FALLBACK[kind] if columns % 256 and kind in _FALLBACK else kind


def weight_bytes(shape: Shape, name: str) -> tuple[int, int]:
    """(bytes of the whole file's tensors, bytes read per decoded token)."""
    total = streamed = 0.0
    for role, layer, columns, rows in _matrices(shape):
        size = columns * rows * BITS[tensor_type(shape, name, role, layer, columns)] / 8
        total += size
        streamed += 0 if role == "embedding" else size
    vectors = shape.layers * 2 * shape.hidden + shape.hidden
    if shape.qkv_bias:
        vectors += shape.layers * (shape.heads + 2 * shape.kv_heads) * shape.head_dim
    return int(total + 4 * vectors), int(streamed + 4 * vectors)


def graph_cost(model: str, name: str, *, kv_bytes: int = 2, context_tokens: int = 2048) -> GraphCost:
    """The cost model's input for a known model in a llama.cpp format (float16 KV unless told otherwise)."""
    shape = SHAPES[model]
    total, streamed = weight_bytes(shape, name)
    linear = sum(c * r for role, _, c, r in _matrices(shape) if role not in ("head", "embedding"))
    return GraphCost(
        total_weight_bytes=total,
        streamed_weight_bytes=streamed,
        linear_macs_per_token=linear,
        head_macs=shape.hidden * shape.vocab,
        attention_macs_per_pair=2 * shape.layers * shape.heads * shape.head_dim,
        kv_bytes_per_token=2 * shape.layers * shape.kv_heads * shape.head_dim * kv_bytes,
        context_tokens=context_tokens,
        arithmetic="float32" if name == "F32" else "int8",
    )
