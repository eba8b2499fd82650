"""Tiny ONNX graphs that follow the manifest's contract, written with onnx.helper, and their torch twin.

The exporter is not used: these tests show that the device runtime and the contract agree on their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edge_reasoner.contract.bundle.manifest import DecoderSpec, EncoderSpec

BLOCK = 32
MS = "com.microsoft"
VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, CONTEXT = 96, 64, 4, 2, 16, 128, 2, 1280
EPSILON, THETA = 1e-5, 10000.0


def decoder_spec(kv_dtype: str = "float32", **changes) -> DecoderSpec:
    """The tiny decoder's spec."""
    fields = {
        "family": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "kv_heads": (KV_HEADS,) * LAYERS,
        "head_dim": (HEAD_DIM,) * LAYERS,
        "kv_dtype": kv_dtype,
        "context_tokens": CONTEXT,
        "parameters": 100_000,
        "eos_token_ids": (2,),
        "bos_token_id": 1,
    }
    return DecoderSpec(**{**fields, **changes})


def encoder_spec() -> EncoderSpec:
    """The tiny encoder's spec."""
    return EncoderSpec(
        family="bert", vocab_size=VOCAB, dimension=HIDDEN, context_tokens=64, parameters=6144, pooling="mean"
    )


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights by canonical name; the linear ones lie exactly on a symmetric int4 grid."""
    rng = np.random.default_rng(seed)
    shapes = {"embed": (VOCAB, HIDDEN), "head": (VOCAB, HIDDEN)}
    for i in range(LAYERS):
        shapes |= {
            f"{i}.q": (HEADS * HEAD_DIM, HIDDEN),
            f"{i}.k": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{i}.v": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{i}.o": (HIDDEN, HEADS * HEAD_DIM),
            f"{i}.gate": (FFN, HIDDEN),
            f"{i}.up": (FFN, HIDDEN),
            f"{i}.down": (HIDDEN, FFN),
        }
    result = {
        name: rng.normal(0, 1.0 if name == "embed" else 0.25, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    for name, value in result.items():
        if name != "embed":
            result[name] = dequantize(*quantize(value))
    for name in ["norm", *(f"{i}.{n}" for i in range(LAYERS) for n in ("attn_norm", "mlp_norm"))]:
        result[name] = rng.uniform(0.5, 1.5, HIDDEN).astype(np.float32)
    return result


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int4, block 32: integers 0..15 [N, blocks, 32] (zero point 8) and scales [N, blocks]."""
    blocks = weight.reshape(weight.shape[0], -1, BLOCK)
    scales = np.maximum(np.abs(blocks).max(-1), 1e-12) / 7
    return np.clip(np.rint(blocks / scales[..., None]) + 8, 0, 15).astype(np.uint8), scales.astype(np.float32)


def dequantize(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Float32 [N, K] of quantized blocks."""
    return ((integers.astype(np.float32) - 8) * scales[..., None]).reshape(integers.shape[0], -1)


@dataclass
class _Builder:
    accuracy_level: int
    kv_dtype: str
    nodes: list = field(default_factory=list)
    initializers: list = field(default_factory=list)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value, order="C"), name))
        return name

    def node(self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes) -> str:
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def linear(self, x: str, weight: np.ndarray, name: str) -> str:
        integers, scales = quantize(weight)
        packed = integers[..., 0::2] | (integers[..., 1::2] << 4)
        return self.node(
            "MatMulNBits",
            [x, self.constant(f"{name}.q4", packed), self.constant(f"{name}.scales", scales.reshape(-1))],
            [f"{name}.out"],
            MS,
            K=weight.shape[1],
            N=weight.shape[0],
            bits=4,
            block_size=BLOCK,
            accuracy_level=self.accuracy_level,
        )

    def norm(self, x: str, weight: np.ndarray, name: str) -> str:
        return self.node(
            "SimplifiedLayerNormalization",
            [x, self.constant(f"{name}.w", weight)],
            [f"{name}.out"],
            epsilon=EPSILON,
            axis=-1,
        )

    def attention(self, x: str, w: dict[str, np.ndarray], i: int) -> str:
        qkv = self.linear(x, np.concatenate([w[f"{i}.{n}"] for n in "qkv"]), f"{i}.qkv")
        if half := self.kv_dtype == "float16":
            qkv = self.node("Cast", [qkv], [f"{i}.qkv16"], to=TensorProto.FLOAT16)
        past = [f"past_key_values.{i}.{side}" for side in ("key", "value")]
        present = [f"present.{i}.{side}" for side in ("key", "value")]
        out = self.node(
            "GroupQueryAttention",
            [qkv, "", "", *past, "seqlens_k", "total_sequence_length", "cos", "sin"],
            [f"{i}.attn", *present],
            MS,
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
            do_rotary=1,
            rotary_interleaved=0,
        )
        if half:
            out = self.node("Cast", [out], [f"{i}.attn32"], to=TensorProto.FLOAT)
        return self.linear(out, w[f"{i}.o"], f"{i}.o")


def decoder_model(
    w: dict[str, np.ndarray],
    accuracy_level: int = 0,
    kv_dtype: str = "float32",
    context: int | str = "context",
) -> onnx.ModelProto:
    """A Llama decoder of the tiny dimensions with the inputs and outputs of the manifest's DecoderSpec."""
    b = _Builder(accuracy_level, kv_dtype)
    kv_numpy = {"float32": np.float32, "float16": np.float16}[kv_dtype]
    frequencies = THETA ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = np.outer(np.arange(CONTEXT), frequencies)
    b.constant("cos", np.cos(angles).astype(kv_numpy))
    b.constant("sin", np.sin(angles).astype(kv_numpy))
    x = b.node("Gather", [b.constant("embed", w["embed"]), "input_ids"], ["x"])
    for i in range(LAYERS):
        attn = b.attention(b.norm(x, w[f"{i}.attn_norm"], f"{i}.attn_norm"), w, i)
        x = b.node("Add", [x, attn], [f"{i}.x1"])
        h = b.norm(x, w[f"{i}.mlp_norm"], f"{i}.mlp_norm")
        gate, up = b.linear(h, w[f"{i}.gate"], f"{i}.gate"), b.linear(h, w[f"{i}.up"], f"{i}.up")
        sigmoid = b.node("Sigmoid", [gate], [f"{i}.sigmoid"])
        silu = b.node("Mul", [gate, sigmoid], [f"{i}.silu"])
        product = b.node("Mul", [silu, up], [f"{i}.product"])
        x = b.node("Add", [x, b.linear(product, w[f"{i}.down"], f"{i}.down")], [f"{i}.x2"])
    end, axis = b.constant("end", np.array([np.iinfo(np.int64).max])), b.constant("axis", np.array([1]))
    start = b.node("Neg", ["states_to_keep"], ["states_start"])
    states = b.norm(b.node("Slice", [x, start, end, axis], ["states"]), w["norm"], "norm")
    b.node("Gather", [states, b.constant("final", np.array(-1))], ["hidden_last"], axis=1)
    b.node("ReduceSum", [states, axis], ["hidden_sum"], keepdims=0)
    start = b.node("Neg", ["logits_to_keep"], ["start"])
    b.linear(b.node("Slice", [states, start, end, axis], ["last"]), w["head"], "head")
    b.node("Identity", ["head.out"], ["logits"])
    return _model(b, *_decoder_values(kv_dtype, context))


def _decoder_values(kv_dtype: str, context: int | str) -> tuple[list, list]:
    kv_type = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16}[kv_dtype]
    kv_shape = ["batch", KV_HEADS, context, HEAD_DIM]
    info = helper.make_tensor_value_info
    inputs = [
        info("input_ids", TensorProto.INT64, ["batch", "tokens"]),
        info("seqlens_k", TensorProto.INT32, ["batch"]),
        info("total_sequence_length", TensorProto.INT32, []),
        info("logits_to_keep", TensorProto.INT64, [1]),
        info("states_to_keep", TensorProto.INT64, [1]),
    ]
    outputs = [info("logits", TensorProto.FLOAT, ["batch", "kept", VOCAB])]
    outputs += [info(f"hidden_{name}", TensorProto.FLOAT, ["batch", HIDDEN]) for name in ("last", "sum")]
    for i in range(LAYERS):
        for side in ("key", "value"):
            inputs.append(info(f"past_key_values.{i}.{side}", kv_type, kv_shape))
            outputs.append(info(f"present.{i}.{side}", kv_type, kv_shape))
    return inputs, outputs


def encoder_model(w: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Mean-pooled, L2-normalized word embeddings with the encoder contract's inputs and output."""
    b = _Builder(0, "float32")
    x = b.node("Gather", [b.constant("embed", w["embed"]), "input_ids"], ["x"])
    types = b.node("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT)
    axis = b.constant("axis", np.array([2]))
    x = b.node("Add", [x, b.node("Unsqueeze", [types, axis], ["types3"])], ["typed"])
    mask = b.node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT)
    mask = b.node("Unsqueeze", [mask, axis], ["mask3"])
    rows = b.constant("rows", np.array([1]))
    total = b.node("ReduceSum", [b.node("Mul", [x, mask], ["masked"]), rows], ["total"], keepdims=0)
    count = b.node("ReduceSum", [mask, rows], ["count"], keepdims=0)
    mean = b.node("Div", [total, count], ["mean"])
    b.node("LpNormalization", [mean], ["embedding"], axis=-1, p=2)
    info = helper.make_tensor_value_info
    names = ("input_ids", "attention_mask", "token_type_ids")
    return _model(
        b,
        [info(name, TensorProto.INT64, ["batch", "tokens"]) for name in names],
        [info("embedding", TensorProto.FLOAT, ["batch", HIDDEN])],
    )


def _model(b: _Builder, inputs: list, outputs: list) -> onnx.ModelProto:
    graph = helper.make_graph(b.nodes, "tiny", inputs, outputs, b.initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def save(model: onnx.ModelProto, path: Path) -> Path:
    """Writes the graph and, beside it, `<name>.data` with every tensor of 64 bytes or more."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=64)
    return path


def reference_logits(w: dict[str, np.ndarray], token_ids: list[int]) -> np.ndarray:
    """float32 [tokens, vocab] of transformers' Llama with the same (dequantized) weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    names = {"embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm"}
    parts = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
    }
    parts |= {part: f"mlp.{part}_proj" for part in ("gate", "up", "down")}
    parts |= {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    for i in range(LAYERS):
        names |= {f"{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in parts.items()}
    state = {f"{names[name]}.weight": torch.from_numpy(value) for name, value in w.items()}
    model.load_state_dict(state)
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].float().numpy()
