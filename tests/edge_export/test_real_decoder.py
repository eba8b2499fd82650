"""SmolLM2 as exported beside transformers' own Llama with the weights that gguf's own reader gives."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from support.sequences import OneSequence
from transformers import LlamaConfig, LlamaForCausalLM

from edge_export.options import ExportOptions
from edge_export.pipeline import export
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.contract.bundle.open import open_bundle

pytestmark = pytest.mark.real_model
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


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    """transformers' Llama with SmolLM2's weights."""
    reader = gguf.GGUFReader(smollm2_gguf)
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


@pytest.fixture(scope="module")
def session(smollm2_gguf, tmp_path_factory):
    """The fp32 bundle's session, as the device opens it."""
    folder = tmp_path_factory.mktemp("smollm2") / "fp32"
    text = folder.with_name("few.txt")
    text.write_text("Water boils at a hundred degrees.")  # its figures are not what is tested here
    export(
        str(smollm2_gguf),
        "generic-x86",
        folder,
        ExportOptions(recipe="fp32", calibration=text, quality_text=text, context_tokens=512),
    )
    bundle = open_bundle(folder)
    component = bundle.component("reasoner")
    opened = OneSequence(OrtDecoder(bundle.path_of(component.variants[-1].graph), component.spec, threads=2))
    yield opened
    opened.close()


def test_logits_equal_transformers(smollm2, session):
    """Over 256 tokens, in prefill and decode, no logit differs by more than 2e-3."""
    ids = torch.randint(0, VOCAB, (256,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = smollm2(ids[None]).logits[0].numpy()
    session.rewind(0)
    worst = 0.0
    for piece in np.split(np.arange(256), [200, 201, 202, 203, 204]):
        found = session.extend(ids.numpy()[piece], num_logits=len(piece)).reshape(len(piece), -1)
        worst = max(worst, float(np.abs(found - expected[piece]).max()))
    assert worst <= 2e-3


def test_greedy_tokens_equal_transformers(smollm2, session):
    """64 greedy tokens after a prompt are the same ones."""
    prompt = [1, 9690, 198, 2683, 359, 253]
    with torch.no_grad():
        expected = smollm2.generate(
            torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :]
    session.rewind(0)
    row = session.extend(np.array(prompt))
    found = []
    for _ in range(64):
        found.append(int(np.argmax(row)))
        row = session.extend(np.array(found[-1:]))
    assert found == expected.tolist()
