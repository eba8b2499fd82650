"""transformers' own Llama with the weights of a SmolLM2-135M file, as gguf's own reader gives them."""

from __future__ import annotations

from pathlib import Path

import gguf
import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB, LAYERS, HEAD_DIM = 49152, 30, 64
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def smollm2_of_transformers(path: Path) -> LlamaForCausalLM:
    """The model in the .gguf file at `path`, in float32; nothing of ours takes part."""
    reader = gguf.GGUFReader(path)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=LAYERS,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_theta=100_000.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.from_numpy(tensors["token_embd.weight"].copy()))
        model.model.norm.weight.copy_(torch.from_numpy(tensors["output_norm.weight"].copy()))
        for index in range(LAYERS):
            for name, part in PARTS.items():
                value = torch.from_numpy(tensors[f"blk.{index}.{part}.weight"].copy())
                if part in ("attn_q", "attn_k"):  # undo llama.cpp's pairing, head by head
                    halves = [torch.cat([head[0::2], head[1::2]]) for head in value.split(HEAD_DIM)]
                    value = torch.cat(halves)
                model.get_submodule(f"model.layers.{index}.{name}").weight.copy_(value)
    return model
