"""Small random models of every family, made by transformers, and the same weights as GGUF files.

The GGUF writer follows llama.cpp's converter (names, metadata, row order, norm offsets), written from its
description and independent of the loader under test.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
import transformers

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, CONTEXT = 96, 64, 4, 2, 16, 96, 256
BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": FFN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}

#: case → (transformers' model class, its config class, what differs from BASE)
CASES = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {"tie_word_embeddings": True}),
    "llama-untied-mha": ("LlamaForCausalLM", "LlamaConfig", {"num_key_value_heads": HEADS}),
    "llama3-rope": ("LlamaForCausalLM", "LlamaConfig", {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}},
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("MistralForCausalLM", "MistralConfig", {"sliding_window": 9}),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2ForCausalLM", "Qwen2Config", {"tie_word_embeddings": False}),
    "qwen2-window": ("Qwen2ForCausalLM", "Qwen2Config", QWEN_WINDOW),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "num_hidden_layers": 7,
            "head_dim": 32,
            "sliding_window": 8,
            "query_pre_attn_scalar": 32,
            "rope_parameters": GEMMA_ROPES,
        },
    ),
    "gemma3-softcap": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            "head_dim": 32,
            "sliding_window": 8,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 5.0,
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
}


def make_model(case: str, seed: int = 0, **more) -> torch.nn.Module:
    """The case's transformers model, float32, eval; norms and biases are random too, not ones and zeros.

    `more` changes its configuration further.
    """
    model_class, config_class, changes = CASES[case]
    config = getattr(transformers, config_class)(**{**BASE, **changes, **more})
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def tokens(count: int = 40, seed: int = 1) -> torch.Tensor:
    """Random token ids [1, count]."""
    return torch.randint(0, VOCAB, (1, count), generator=torch.Generator().manual_seed(seed))


def logits_of(model: torch.nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
    """transformers' logits [B, T, vocab]."""
    with torch.no_grad():
        return model(token_ids).logits


def close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-4) -> bool:
    """Whether the largest difference is within `relative` of the largest expected magnitude."""
    return bool((found - expected).abs().max() <= relative * expected.abs().max())


_GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA_PARTS = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TOPS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def _gguf_name(name: str, architecture: str) -> str:
    stem, kind = name.rsplit(".", 1)
    if stem in _TOPS:
        return f"{_TOPS[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    parts = {**_GGUF_PARTS, **(_GEMMA_PARTS if architecture == "gemma3" else {})}
    return f"blk.{layer}.{parts[part]}.{kind}"


def _interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's `permute`: half-split rotary rows → interleaved."""
    split = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return split.swapaxes(1, 2).reshape(weight.shape)


def _add_metadata(writer: gguf.GGUFWriter, config: transformers.PretrainedConfig, head_dim: int) -> None:
    ropes = config.rope_parameters
    rope = ropes.get("full_attention", ropes)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if writer.arch == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        if config.final_logit_softcapping:
            writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _llama3_factors(model: torch.nn.Module, head_dim: int) -> torch.Tensor:
    plain = 1.0 / 10_000.0 ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    return plain / model.model.rotary_emb.inv_freq


def write_gguf(
    model: torch.nn.Module,
    path: Path,
    quantization: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: dict[str, object] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write `model` as llama.cpp's converter would; matrices in `quantization`, vectors in F32.

    `extra` are calls of the writer for more metadata, `tensors` are stored beside the model's own.
    """
    config = model.config
    architecture = "llama" if config.model_type == "mistral" else config.model_type.removesuffix("_text")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture)
    _add_metadata(writer, config, head_dim)
    writer.add_string("tokenizer.ggml.model", "none")
    for key, value in (extra or {}).items():
        getattr(writer, key)(value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = tensor.detach().clone()
        if architecture == "llama" and ".q_proj." in name:
            stored = _interleave(stored, config.num_attention_heads)
        if architecture == "llama" and ".k_proj." in name:
            stored = _interleave(stored, config.num_key_value_heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            stored = stored + 1
        kind = quantization if stored.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(stored.numpy(), kind)
        writer.add_tensor(_gguf_name(name, architecture), data, raw_dtype=kind)
    if config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(model, head_dim).numpy())
    for name, tensor in (tensors or {}).items():
        writer.add_tensor(name, np.asarray(tensor, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
