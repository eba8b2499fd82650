"""Every tensor of a checkpoint is used, known to be harmless, or refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_berts import SHAPES, make_bert
from support.tiny_models import HEADS, KV_HEADS, close, logits_of, make_model, tokens, write_gguf

from edge_export.checkpoint.bert import load_encoder
from edge_export.checkpoint.load import load_checkpoint
from edge_export.model.decoder import Decoder
from edge_reasoner.errors import CheckpointError

HIDDEN, HEAD_DIM = 64, 16


def directory(path, extra=None, case="llama", config=None, **changes):
    """A Hugging Face directory with more tensors and other fields than transformers would write."""
    model = make_model(case, **changes)
    model.save_pretrained(path)
    file = path / "model.safetensors"
    save_file({**load_file(file), **(extra or {})}, file, metadata={"format": "pt"})
    content = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(content | (config or {})))
    return model


def computed(checkpoint):
    """The logits of our decoder."""
    with torch.no_grad():
        return Decoder.from_source(checkpoint.config, checkpoint.source)(tokens())


def with_one_bias(name, bias):
    """transformers' tiny llama with one bias and otherwise zeros."""
    model = make_model("llama", attention_bias=True)
    state = {
        key: torch.zeros_like(value) for key, value in model.state_dict().items() if key.endswith("bias")
    }
    model.load_state_dict({**make_model("llama").state_dict(), **state, name: bias})
    return model


def gguf_with(path, tensors):
    """A tiny llama's GGUF file with more tensors than the model has."""
    return write_gguf(make_model("llama"), path, tensors=tensors)


Q = "model.layers.0.self_attn.q_proj"
REFUSED = {
    "LoRA": ({f"{Q}.lora_A.default.weight": torch.ones(4, HIDDEN)}, "lora_A.*merge the adapter"),
    "classifier": ({"score.weight": torch.ones(2, HIDDEN)}, r"'score\.weight'.*classifier"),
    "value head": ({"v_head.summary.weight": torch.ones(1, HIDDEN)}, "v_head.*training"),
    "block": ({"model.layers.2.mlp.up_proj.weight": torch.ones(4, 4)}, r"layers\.2\..*has 2 blocks"),
    "norm": ({"model.layers.1.self_attn.q_norm.weight": torch.ones(16)}, "q_norm.*no place for this norm"),
    "MTP": ({"model.mtp.0.weight": torch.ones(2, 2)}, "mtp.*multi-token"),
    "o bias": ({"model.layers.0.self_attn.o_proj.bias": torch.ones(HIDDEN)}, "o_proj.bias.*this bias"),
    "experts": ({"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2, 2)}, "mixtures of experts"),
    "vision": ({"vision_tower.patch.weight": torch.ones(2, 2)}, "vision_tower.*only text models"),
    "many": (
        {f"x{i}.weight": torch.ones(1) for i in range(5)},
        "5 tensors .*'x0.weight', 'x1.weight', 'x2.*2 more",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_unused_weights_of_a_directory(case, tmp_path):
    """A weight that the graph would not use is refused in one line that names it and says what to do."""
    extra, message = REFUSED[case]
    directory(tmp_path, extra)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_harmless_tensors_of_a_directory(tmp_path):
    """Saved buffers, zero biases and a head equal to its tied embedding change nothing."""
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),
        "model.position_ids": torch.arange(8),
        "model.layers.0.self_attn.o_proj.bias": torch.zeros(HIDDEN),
    }
    model = directory(tmp_path, extra)
    extra["lm_head.weight"] = model.model.embed_tokens.weight.detach().clone()
    directory(tmp_path, extra)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.config.tied_embeddings and checkpoint.warnings == ()


def test_a_head_that_differs_from_its_tied_embedding(tmp_path):
    """Two heads, one by the configuration and one by the file, are a contradiction."""
    directory(tmp_path, {"lm_head.weight": torch.ones(96, HIDDEN)})
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' differs from the embedding"):
        load_checkpoint(tmp_path)


def test_announced_attention_biases_agree_with_transformers(tmp_path):
    """`attention_bias` with a zero bias on the output is the model that transformers computes."""
    model = make_model("llama", attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.bias.zero_()
    model.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.config.qkv_bias and checkpoint.warnings == ()
    found = computed(checkpoint)
    assert close(found, logits_of(model, tokens()))


def test_unannounced_and_partial_biases_are_used(tmp_path):
    """A q bias on the second layer alone acts as transformers' with zeros elsewhere, and is reported."""
    bias = torch.linspace(-1, 1, HEADS * HEAD_DIM)
    model = with_one_bias("model.layers.1.self_attn.q_proj.bias", bias)
    directory(tmp_path, {"model.layers.1.self_attn.q_proj.bias": bias})
    checkpoint = load_checkpoint(tmp_path)
    found = computed(checkpoint)
    assert close(found, logits_of(model, tokens()))
    assert "'q_proj.bias'" in checkpoint.warnings[0] and "5 are not stored" in checkpoint.warnings[1]


def test_partial_biases_of_a_gguf_are_used(tmp_path):
    """A bias on k alone, from the second block on, is used (as llama.cpp does), zeros elsewhere."""
    bias = torch.linspace(-1, 1, KV_HEADS * HEAD_DIM)
    paired = bias.reshape(KV_HEADS, 2, HEAD_DIM // 2).swapaxes(1, 2).reshape(-1)  # llama.cpp's row order
    model = with_one_bias("model.layers.1.self_attn.k_proj.bias", bias)
    checkpoint = load_checkpoint(gguf_with(tmp_path / "m.gguf", {"blk.1.attn_k.bias": paired}))
    found = computed(checkpoint)
    assert close(found, logits_of(model, tokens()))
    assert "attn_k.bias" in checkpoint.warnings[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blk.1.attn_output.bias", "no place for this bias"),
        ("blk.0.attn_q_norm.weight", "no place for this norm"),
        ("blk.2.ffn_up.weight", "has 2 blocks"),
        ("blk.0.ffn_up_exps.weight", "mixtures of experts"),
        ("blk.1.nextn.eh_proj.weight", "multi-token"),
        ("v.patch_embd.weight", "only text models"),
        ("rope_factors_long.weight", "no place for them"),
        ("output_norm.bias", "no place for this bias"),
        ("cls.output.weight", "classifier"),
        ("blk.0.attn_q.weight.lora_a", "merge the adapter"),
    ],
)
def test_unused_weights_of_a_gguf(name, message, tmp_path):
    """What llama.cpp would use and the graph would not, or nobody, is refused by name."""
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(gguf_with(tmp_path / "m.gguf", {name: np.ones(16)}))
    assert f"'{name}'" in str(caught.value)


def test_an_adapter_beside_the_weights_is_reported(tmp_path):
    """An adapter file that nobody reads is a warning."""
    directory(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    assert "adapter_model.safetensors: an adapter that is not used" in load_checkpoint(tmp_path).warnings[0]


def test_an_index_that_disagrees_with_its_shards(tmp_path):
    """A tensor that the index lists must be in the shard it names."""
    model = make_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    index = tmp_path / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    files = sorted(set(good["weight_map"].values()))
    assert len(files) > 1 and load_checkpoint(tmp_path)
    for name, file, message in (
        ("model.layers.7.up.weight", files[0], "which no shard holds"),
        (next(n for n, f in good["weight_map"].items() if f == files[0]), files[1], "but .* holds it"),
    ):
        index.write_text(json.dumps({**good, "weight_map": {**good["weight_map"], name: file}}))
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path)


def bert_with(path, extra):
    make_bert(path, next(iter(SHAPES)))
    file = path / "model.safetensors"
    save_file({**load_file(file), **extra}, file, metadata={"format": "pt"})
    return path


def test_encoders(tmp_path):
    """Pooler, pre-training heads and position ids are harmless to an encoder; a classifier is not."""
    harmless = {
        "pooler.dense.weight": torch.ones(4, 4),
        "cls.predictions.bias": torch.ones(4),
        "embeddings.position_ids": torch.arange(8),
    }
    assert load_encoder(bert_with(tmp_path / "a", harmless))
    names = ("classifier.weight", "encoder.layer.0.crossattention.self.query.weight", "encoder.layer.99.x")
    for name in names:
        with pytest.raises(CheckpointError, match=f"would not be used: '{name}'"):
            load_encoder(bert_with(tmp_path / name, {name: torch.ones(4)}))
