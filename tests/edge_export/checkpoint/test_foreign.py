"""What lies in the place of a checkpoint's files and tensors is named, with what to do about it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_checkpoints import write_checkpoint
from support.tiny_models import make_model, write_gguf

from edge_export.checkpoint.load import find_model, load_checkpoint
from edge_reasoner.errors import CheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
PAGE = b"\n<!DOCTYPE html><html><title>404</title></html>" + b" " * 64
Q = "model.layers.0.self_attn.q_proj"


def refusal(path):
    """The one line with which the checkpoint and its tokenizer are refused."""
    with pytest.raises(CheckpointError) as caught:
        _ = load_checkpoint(path).tokenizer
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
)
@pytest.mark.parametrize(("content", "named"), [(POINTER, "Git LFS pointer"), (PAGE, "a web page")])
def test_stand_ins_of_downloads(name, content, named, tmp_path):
    """A pointer or a page in the place of a file is called that, not corrupt, and no chat template."""
    write_checkpoint(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert f"{tmp_path / name}: {named}" in refusal(tmp_path).replace("a Git", "Git")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.gguf", POINTER, "Git LFS pointer"),
        ("m.gguf", PAGE, "a web page"),
        ("pytorch_model.bin", b"PK\x03\x04" + b" " * 64, "pickles are not read"),
        ("config.json", b'{"model_type": "llama", "hidden_size": 4}', "give its directory"),
        ("m.gguf", b"short", "truncated GGUF"),
    ],
)
def test_files_that_are_no_model(name, content, message, tmp_path):
    """A file that is given as the model says what it is."""
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", "pickles are not read"),
        ("pytorch_model.bin.index.json", "pickles are not read"),
        ("consolidated.00.pth", "pickles are not read"),
        ("consolidated.safetensors", "original release"),
        ("model.fp16.safetensors", r"only model\.safetensors is read"),
        ("model-00001-of-00002.safetensors", "no index"),
        ("adapter_model.safetensors", r"an adapter \(LoRA\) alone"),
        ("tf_model.h5", "TensorFlow's"),
    ],
)
def test_directories_with_other_weights(name, message, tmp_path):
    """Weights under another name or in another format are named, not only missing."""
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"no weights found.*'{name}': .*{message}"):
        load_checkpoint(tmp_path)


def test_directories_without_a_model(tmp_path):
    """An adapter's folder and a folder of the Hub's cache say what they are."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="it is an adapter"):
        find_model(tmp_path)
    (tmp_path / "hub" / "snapshots").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="below snapshots"):
        find_model(tmp_path / "hub")


@pytest.mark.parametrize("name", ["consolidated.safetensors", "adapter_model.safetensors"])
def test_another_file_is_not_taken_for_the_weights(name, tmp_path):
    """A file beside the weights, given by name, is refused instead of exporting the weights beside it."""
    write_checkpoint(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert find_model(tmp_path / "model.safetensors") == tmp_path
    with pytest.raises(CheckpointError, match=r"not the model's weights, which are in model\.safetensors"):
        find_model(tmp_path / name)


def renamed(old, new):
    """Every tensor's name with a part replaced."""
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


TENSORS = {
    "torch.compile": (renamed("model.", "_orig_mod.model."), "training wrapper's prefix"),
    "DataParallel": (renamed("model.", "module.model."), "training wrapper's prefix"),
    "PEFT": (renamed("model.", "base_model.model.model."), "adapter; merge"),
    "LoRA's base": (renamed("q_proj.weight", "q_proj.base_layer.weight"), "adapter; merge"),
    "fused": (renamed("q_proj.weight", "qkv_proj.weight"), "stored as one"),
    "fused MLP": (renamed("gate_proj.weight", "gate_up_proj.weight"), "stored as one"),
    "AWQ": (renamed("q_proj.weight", "q_proj.qweight"), "quantized weights"),
    "compressed": (renamed("q_proj.weight", "q_proj.weight_packed"), "quantized weights"),
    "original release": (renamed("model.embed_tokens", "tok_embeddings"), "original release"),
    "packed": (lambda t: {**t, f"{Q}.weight": torch.ones(8, 8, dtype=torch.uint8)}, "type U8.*quantized"),
    "MLX": (
        lambda t: {**t, f"{Q}.weight": torch.ones(8, 8, dtype=torch.uint8), f"{Q}.scales": torch.ones(1)},
        r"type U8.*q_proj\.scales.*quantized weights",
    ),
    "FP8": (lambda t: {**t, f"{Q}.weight_scale_inv": torch.ones(1, 1)}, "quantized weights are not read"),
    "double": (
        lambda t: {**t, f"{Q}.weight": t[f"{Q}.weight"].double()},
        r"type F64; allowed are F32, F16, BF16$",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_of_another_kind(case, tmp_path):
    """A tensor that is missing or of another type says why, as far as the names tell."""
    edit, message = TENSORS[case]
    write_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"add_type": "adapter"}, "an adapter"),
        ({"add_type": "mmproj"}, "multimodal projector"),
        ({"add_type": "imatrix"}, "importance matrix"),
    ],
)
def test_gguf_files_of_other_types(extra, message, tmp_path):
    """`general.type` tells what is no model by itself."""
    path = write_gguf(make_model("llama"), tmp_path / "m.gguf", extra=extra)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path)
