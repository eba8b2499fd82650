"""The BERT sentence encoder as one plain torch module; its parameter names are the canonical tensor names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import nn

from edge_export.model.config import EncoderConfig, TensorSource

#: as in sentence-transformers: an all-masked row pools to zeros instead of NaN
_MIN_TOKENS = 1e-9


def encoder_layer_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Layer-local tensor names (without `layers.{i}.`) → shapes, in a fixed order."""
    hidden, ffn = config.hidden_size, config.ffn_width
    shapes: dict[str, tuple[int, ...]] = {}
    for name in ("q", "k", "v", "o"):
        shapes |= {f"{name}.weight": (hidden, hidden), f"{name}.bias": (hidden,)}
    shapes |= {"attn_norm.weight": (hidden,), "attn_norm.bias": (hidden,)}
    shapes |= {"up.weight": (ffn, hidden), "up.bias": (ffn,)}
    shapes |= {"down.weight": (hidden, ffn), "down.bias": (hidden,)}
    return shapes | {"mlp_norm.weight": (hidden,), "mlp_norm.bias": (hidden,)}


def encoder_tensor_shapes(config: EncoderConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor name of the encoder → shape, in the order the model uses them."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed.word.weight": (config.vocab_size, hidden),
        "embed.position.weight": (config.context_tokens, hidden),
        "embed.token_type.weight": (config.token_types, hidden),
        "embed.norm.weight": (hidden,),
        "embed.norm.bias": (hidden,),
    }
    for index in range(config.num_layers):
        shapes |= {f"layers.{index}.{name}": shape for name, shape in encoder_layer_shapes(config).items()}
    return shapes


def encoder_parameter_count(config: EncoderConfig) -> int:
    """The number of parameters (BERT's unused pooler head is not part of the encoder)."""
    return sum(prod(shape) for shape in encoder_tensor_shapes(config).values())


class EncoderEmbedding(nn.Module):
    """Word + position + token type (always type 0), normed."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position = nn.Embedding(config.context_tokens, config.hidden_size)
        self.token_type = nn.Embedding(config.token_types, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_epsilon)

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """token_ids int64 [B, T] → float32 [B, T, hidden]."""
        positions = self.position.weight[: token_ids.shape[1]]
        hidden: torch.Tensor = self.norm(self.word(token_ids) + self.token_type.weight[0] + positions)
        return hidden


class EncoderLayer(nn.Module):
    """Bidirectional self-attention and a GELU network, each normed after its residual sum."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.num_heads = config.num_heads
        self.q = nn.Linear(hidden, hidden)
        self.k = nn.Linear(hidden, hidden)
        self.v = nn.Linear(hidden, hidden)
        self.o = nn.Linear(hidden, hidden)
        self.attn_norm = nn.LayerNorm(hidden, eps=config.norm_epsilon)
        self.up = nn.Linear(hidden, config.ffn_width)
        self.down = nn.Linear(config.ffn_width, hidden)
        self.mlp_norm = nn.LayerNorm(hidden, eps=config.norm_epsilon)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """hidden [B, T, hidden], mask bool [B, 1, 1, T] (True = attend to) → [B, T, hidden]."""
        heads = (self.num_heads, hidden.shape[-1] // self.num_heads)
        query, key, value = (
            project(hidden).unflatten(-1, heads).transpose(1, 2) for project in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        hidden = self.attn_norm(hidden + self.o(mixed.transpose(1, 2).flatten(2)))
        normed: torch.Tensor = self.mlp_norm(hidden + self.down(F.gelu(self.up(hidden))))
        return normed


class Encoder(nn.Module):
    """A sentence encoder. Parameters are float32 and randomly initialised; see `from_source`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = EncoderEmbedding(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))

    @classmethod
    def from_source(cls, config: EncoderConfig, source: TensorSource) -> Encoder:
        """The encoder with a checkpoint's weights (float32), in eval mode.

        Raises CheckpointError if a tensor is missing or corrupt.
        """
        with torch.device("meta"):
            encoder = cls(config)
        encoder.load_state_dict(
            {name: source.get(name) for name in encoder_tensor_shapes(config)}, assign=True
        )
        return encoder.eval()

    def hidden_states(self, token_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The last hidden states [B, T, hidden]; arguments as for `forward`."""
        mask = attention_mask.to(torch.bool)[:, None, None, :]
        hidden: torch.Tensor = self.embed(token_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return hidden

    def forward(self, token_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """L2-normalized sentence embeddings float32 [B, hidden].

        `token_ids` int64 [B, T], special tokens included, T ≤ context_tokens, padded on the right;
        `attention_mask` [B, T] of any numeric type or bool: 1 for tokens, 0 for padding.
        """
        return self.pooled(self.hidden_states(token_ids, attention_mask), attention_mask)

    def pooled(self, hidden: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """L2-normalized embeddings float32 [B, hidden] of last hidden states [B, T, hidden]."""
        if self.config.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weight = attention_mask.to(hidden.dtype)[:, :, None]
            pooled = (hidden * weight).sum(1) / weight.sum(1).clamp(min=_MIN_TOKENS)
        return F.normalize(pooled, dim=-1)


def padded_batches(
    token_ids: Sequence[Sequence[int]], batch: int = 16
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor]]:
    """Token id lists in groups of like length: their indices, ids int64 [B, T], mask int64 [B, T]."""
    order = sorted(range(len(token_ids)), key=lambda index: len(token_ids[index]))
    for start in range(0, len(order), batch):
        group = order[start : start + batch]
        width = max(len(token_ids[index]) for index in group)
        ids, mask = torch.zeros(2, len(group), width, dtype=torch.int64)
        for row, index in enumerate(group):
            ids[row, : len(token_ids[index])] = torch.tensor(token_ids[index], dtype=torch.int64)
            mask[row, : len(token_ids[index])] = 1
        yield group, ids, mask
