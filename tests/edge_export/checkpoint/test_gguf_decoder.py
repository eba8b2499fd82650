"""GGUF files: every architecture reproduces transformers' and llama.cpp's logits on the same weights."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from support.llama_cpp_logits import llama_cpp_logits
from support.smollm2 import smollm2_of_transformers
from support.tiny_models import CASES, VOCAB, close, logits_of, make_model, tokens, write_gguf

from edge_export.checkpoint.gguf_file import GgufFile
from edge_export.checkpoint.load import detect, load_checkpoint
from edge_export.model.decoder import Decoder
from edge_reasoner.errors import CheckpointError

#: GGUF has no place for a window in llama's and qwen's files, nor for freely chosen layer types or scales
GGUF_CASES = sorted(set(CASES) - {"mistral-window", "qwen2-window", "gemma3-softcap"})


def decoder_of(path) -> Decoder:
    """The Decoder of a checkpoint."""
    checkpoint = load_checkpoint(path)
    return Decoder.from_source(checkpoint.config, checkpoint.source)


@pytest.mark.parametrize("case", GGUF_CASES)
def test_logits_equal_transformers(case, tmp_path):
    """Each architecture's file, written as llama.cpp's converter writes it, gives transformers' logits."""
    model = make_model(case)
    path = write_gguf(model, tmp_path / "model.gguf")
    with torch.no_grad():
        assert close(decoder_of(path)(tokens()), logits_of(model, tokens()))


@pytest.mark.parametrize("case", GGUF_CASES)
def test_logits_equal_llama_cpp(case, tmp_path):
    """llama.cpp reads the same file the same way: rotary order, windows, scales, norms."""
    pytest.importorskip("llama_cpp")
    path = write_gguf(make_model(case), tmp_path / "model.gguf")
    expected = torch.from_numpy(llama_cpp_logits(path, VOCAB, tokens()[0].tolist()))
    with torch.no_grad():
        # llama.cpp takes GELU from a table of fp16 values
        tolerance = 2e-3 if case == "gemma3" else 2e-5
        assert close(decoder_of(path)(tokens())[0], expected, relative=tolerance)


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantized_weights(name, tmp_path):
    """Quantized matrices load as what ggml says they mean, in the canonical row order."""
    kind = gguf.GGMLQuantizationType[name]
    model = make_model("llama")
    source = load_checkpoint(write_gguf(model, tmp_path / "model.gguf", kind)).source
    for canonical, stored in (
        ("layers.1.q.weight", "self_attn.q_proj"),
        ("layers.1.down.weight", "mlp.down_proj"),
    ):
        weight = model.get_submodule(f"model.layers.1.{stored}").weight.detach().numpy()
        expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
        assert np.array_equal(source.get(canonical).numpy(), expected)


def _random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> np.ndarray:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (rows, columns // block_size * block_bytes)
    # bytes below 0x3c keep every fp16 scale finite
    return np.random.default_rng(0).integers(0, 0x3C, shape, dtype=np.uint8)


QUANTIZED = [
    "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "TQ1_0", "TQ2_0", "IQ1_S",
    "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "MXFP4",
]  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZED)
def test_rows_of_every_quantized_type(name, tmp_path):
    """Row slices of every ggml type equal the slices of the whole, dequantized by ggml's own code."""
    kind = gguf.GGMLQuantizationType[name]
    data = _random_blocks(kind, 1100, 256)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    writer.add_tensor("t", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(tmp_path / "t.gguf")
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, kind)
    assert file.shape("t") == (1100, 256)
    for start, stop in ((0, 1100), (3, 1067), (1099, 1100), (5, 5)):
        assert np.array_equal(file.rows("t", start, stop).numpy(), expected[start:stop], equal_nan=True)


def test_end_tokens_and_names(tmp_path):
    """eos, eot and known end markers of any type end a turn; name, licence and template are read."""
    markers = ["<unk>", "<|im_end|>", "<end_of_turn>"] + [f"t{i}" for i in range(VOCAB - 3)]
    extra = {
        "add_token_list": markers,
        "add_token_types": [2, 3, 1] + [1] * (VOCAB - 3),
        "add_bos_token_id": 4,
        "add_eos_token_id": 5,
        "add_eot_token_id": 6,
        "add_name": "Tiny",
        "add_license": "mit",
        "add_chat_template": "{{ messages }}",
    }
    checkpoint = load_checkpoint(write_gguf(make_model("qwen2"), tmp_path / "m.gguf", extra=extra))
    assert checkpoint.config.bos_token_id == 4
    assert checkpoint.config.eos_token_ids == (5, 6, 1, 2)
    assert (checkpoint.name, checkpoint.licence, checkpoint.chat_template) == (
        "Tiny",
        "mit",
        "{{ messages }}",
    )


def test_a_repeated_head_is_tied(tmp_path):
    """A head that repeats the embedding byte for byte counts as tied; another one does not."""
    model = make_model("qwen2-untied")
    assert not load_checkpoint(write_gguf(model, tmp_path / "untied.gguf")).config.tied_embeddings
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    assert load_checkpoint(write_gguf(model, tmp_path / "tied.gguf")).config.tied_embeddings


def test_metadata_of_older_and_newer_writers(tmp_path):
    """Gemma's local layers come from the period or the flags a writer states; else every sixth is global."""
    model = make_model("gemma3")
    windows = {}
    for name, extra in {
        "default": {},
        "period": {"add_sliding_window_pattern": 2},
        "flags": {"add_sliding_window_pattern": [True, False, False, True, True, True, False]},
        "base": {"add_rope_freq_base_swa": 5000.0},
    }.items():
        config = load_checkpoint(write_gguf(model, tmp_path / f"{name}.gguf", extra=extra)).config
        windows[name] = [layer.sliding_window_tokens is not None for layer in config.layers]
        assert config.layers[0].rope.theta == (5000.0 if name == "base" else 10_000.0)
    assert windows["default"] == windows["base"] == [True] * 5 + [False, True]
    assert windows["period"] == [True, False] * 3 + [True]
    assert windows["flags"] == [True, False, False, True, True, True, False]


def test_detect_and_directories(tmp_path):
    """A directory with one GGUF stands for it; with two, both are named; BERT goes to the encoder loader."""
    path = write_gguf(make_model("llama"), tmp_path / "a.gguf")
    assert detect(tmp_path) == detect(path) == "decoder"
    assert load_checkpoint(tmp_path).weights_files == (path,)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "bert")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert detect(tmp_path / "b.gguf") == "encoder"
    with pytest.raises(CheckpointError, match=r"name one: a\.gguf, b\.gguf"):
        detect(tmp_path)


def _flat(extra: dict[str, object], tmp_path, case: str = "llama"):
    return write_gguf(make_model(case), tmp_path / "bad.gguf", extra=extra)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"add_expert_count": 8}, "mixtures of experts are not supported"),
        ({"add_rope_scaling_type": gguf.RopeScalingType.YARN}, "'yarn' is not supported"),
        ({"add_eos_token_id": 96}, "token id 96 is outside the vocabulary of 96"),
    ],
)
def test_unsupported_metadata(extra, message, tmp_path):
    """What the decoder has no mathematics for is refused by name."""
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(_flat(extra, tmp_path))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"llama.block_count", b"llama.block_cound", "block_count is missing"),
        (
            b"\x05\x00\x00\x00\x00\x00\x00\x00llama",
            b"\x05\x00\x00\x00\x00\x00\x00\x00mamba",
            "'mamba' is not supported",
        ),
        (b"output_norm.weight", b"output_nonn.weight", r"'output_norm.weight' \(norm.weight\) is missing"),
        (b"token_embd.weight", b"token_enbd.weight", "there is no tensor 'token_embd.weight'"),
        (b"general.architecture", b"general.architectura", "no general.architecture"),
    ],
)
def test_edited_headers(old, new, message, tmp_path):
    """A renamed key, architecture or tensor is one clear line."""
    path = _flat({}, tmp_path)
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_infinite_weights_are_refused(tmp_path):
    """A weight that is not a number is corruption, found when the tensor is read."""
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    checkpoint = load_checkpoint(write_gguf(model, tmp_path / "m.gguf"))
    with pytest.raises(CheckpointError, match=r"'blk\.0\.ffn_up\.weight' contains NaN or infinity"):
        Decoder.from_source(checkpoint.config, checkpoint.source)


@pytest.mark.real_model
def test_smollm2_equals_llama_and_gguf_reader(smollm2_gguf):
    """The real SmolLM2 file: our Decoder equals transformers' Llama on tensors read by gguf's own reader."""
    torch.set_num_threads(2)
    model = smollm2_of_transformers(smollm2_gguf)
    token_ids = torch.randint(0, 49152, (1, 128), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = decoder_of(smollm2_gguf)(token_ids), model(token_ids).logits
    assert (found - expected).abs().max() <= 1e-3
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
