"""The configuration of the one decoder and the one encoder that every stage works on, and their tensor names.

Every supported causal LM (Llama/SmolLM2, Mistral, Qwen2/2.5, Qwen3, Gemma 3 text) is expressed in these
terms by its loader; later stages never ask for the family. Layers may differ in width: a pruned model is the
same `Decoder` with another config.

Canonical tensor names of a decoder (all in the layout of `torch.nn.Linear`: [out_features, in_features]):

    embed.weight                     [vocab, hidden]
    layers.{i}.attn_norm.weight      [hidden]          before attention
    layers.{i}.q.weight, k, v        [heads·head_dim, hidden]   rows ordered for *half-split* rotary ("NeoX")
    layers.{i}.q.bias, k, v          only if `qkv_bias`
    layers.{i}.q_norm.weight, k_norm [head_dim]        only if `qk_norm`
    layers.{i}.o.weight              [hidden, heads·head_dim]
    layers.{i}.attn_post_norm.weight [hidden]          only if `post_norms` (Gemma): on the branch
    layers.{i}.mlp_norm.weight       [hidden]
    layers.{i}.gate.weight, up       [ffn, hidden]
    layers.{i}.down.weight           [hidden, ffn]
    layers.{i}.mlp_post_norm.weight  [hidden]          only if `post_norms`
    norm.weight                      [hidden]
    head.weight                      [vocab, hidden]   only if not `tied_embeddings`

Norm weights are stored as they are multiplied: Gemma's "+1" has been added by the loader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: `inverse frequency = theta ** (-2i/head_dim)`, then scaled.

    `linear_factor` divides every frequency (Gemma 3 4B+). The llama3_* fields are Llama 3.1's scaling
    (transformers' `_compute_llama3_parameters`); all None when unused. `frequency_factors` (GGUF
    `rope_freqs`, [head_dim/2]) divide the frequencies one by one.
    """

    theta: float
    linear_factor: float = 1.0
    llama3_factor: float | None = None
    llama3_low_freq_factor: float | None = None
    llama3_high_freq_factor: float | None = None
    llama3_original_context_tokens: int | None = None
    frequency_factors: tuple[float, ...] | None = None


@dataclass(frozen=True)
class LayerConfig:
    """One decoder layer; layers may differ."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_width: int
    rope: Rope
    #: attend to at most this many last tokens, itself included; None = all
    sliding_window_tokens: int | None = None


@dataclass(frozen=True)
class DecoderConfig:
    """A causal LM."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "gemma3"]
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerConfig, ...]
    norm_epsilon: float
    context_tokens: int
    activation: Literal["silu", "gelu_tanh"]
    tied_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    post_norms: bool = False
    #: multiplies the embedding row (Gemma: sqrt(hidden)); 1.0 = none
    embedding_scale: float = 1.0
    #: multiplies q·k; None = head_dim ** -0.5
    attention_scale: float | None = None
    #: tanh soft cap on the final logits; None = none
    logit_softcap: float | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class EncoderConfig:
    """A BERT-family encoder (absolute positions, post-norm, exact GELU) used as a sentence encoder.

    Tensor names: embed.word.weight [vocab, hidden], embed.position.weight, embed.token_type.weight,
    embed.norm.weight|bias; layers.{i}.q|k|v|o.weight|bias, layers.{i}.attn_norm.weight|bias,
    layers.{i}.up|down.weight|bias, layers.{i}.mlp_norm.weight|bias.
    """

    family: Literal["bert"]
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    ffn_width: int
    norm_epsilon: float
    context_tokens: int
    token_types: int
    pooling: Literal["mean", "cls"]


class TensorSource(Protocol):
    """Weights by canonical name, read and dequantized one at a time: a model need not fit in memory."""

    def names(self) -> Iterator[str]:
        """Every tensor name, in a fixed order."""

    def get(self, name: str) -> torch.Tensor:
        """The tensor as a fresh contiguous float32. Raises CheckpointError if it is missing or corrupt."""

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of the tensor as a fresh contiguous float32, for matrices too large to hold."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape, without reading the data."""
