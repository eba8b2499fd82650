"""Hugging Face directories: every family gives transformers' logits; configs old and new mean the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from support.tiny_models import BASE, CASES, close, logits_of, make_model, tokens

from edge_export.checkpoint.load import detect, load_checkpoint
from edge_export.model.decoder import Decoder
from edge_reasoner.errors import CheckpointError


def decoder_of(path: Path) -> Decoder:
    """The Decoder of a checkpoint."""
    checkpoint = load_checkpoint(path)
    return Decoder.from_source(checkpoint.config, checkpoint.source)


def edit_config(directory: Path, **changes) -> None:
    """Change config.json; a value of `...` removes the key."""
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(case, tmp_path):
    """Each family's random model, saved and loaded, gives transformers' logits, past every window."""
    model = make_model(case)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        found = decoder_of(tmp_path)(tokens())
    assert close(found, logits_of(model, tokens()))


def test_shards_and_halves(tmp_path):
    """Sharded bf16 safetensors load to the same logits as transformers' own float32 of the same files."""
    make_model("qwen2").to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20KB")
    checkpoint = load_checkpoint(tmp_path)
    assert len(checkpoint.weights_files) > 3
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    decoder = Decoder.from_source(checkpoint.config, checkpoint.source)
    with torch.no_grad():
        assert close(decoder(tokens()), logits_of(reference, tokens()))


def test_fp16(tmp_path):
    """fp16 safetensors become float32 exactly."""
    model = make_model("llama").to(torch.float16)
    model.save_pretrained(tmp_path)
    stored = model.model.layers[1].mlp.up_proj.weight
    assert torch.equal(load_checkpoint(tmp_path).source.get("layers.1.up.weight"), stored.float())


@pytest.mark.parametrize(
    ("case", "old"),
    [
        ("llama", {"rope_theta": 10000.0, "rope_scaling": None}),
        (
            "llama3-rope",
            {
                "rope_theta": 10000,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
            },
        ),
        ("llama-linear", {"rope_theta": 5e4, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        (
            "gemma3",
            {
                "rope_theta": 1e6,
                "rope_local_base_freq": 1e4,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "layer_types": ...,
                "sliding_window_pattern": 6,
            },
        ),
    ],
)
def test_old_rope_names(case, old, tmp_path):
    """config.json as transformers 4 wrote it (rope_theta, rope_scaling) means the same as rope_parameters."""
    make_model(case).save_pretrained(tmp_path)
    new = load_checkpoint(tmp_path).config
    edit_config(tmp_path, rope_parameters=..., **old)
    assert load_checkpoint(tmp_path).config == new


def test_gemma3_within_a_vision_language_model(tmp_path):
    """The text part of a `gemma3` directory loads, with the fields its short text_config leaves out."""
    config = transformers.Gemma3Config(
        text_config={**BASE, "head_dim": 32, "sliding_window": 8, "model_type": "gemma3_text"},
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=1,
        image_token_id=90,
        boi_token_index=91,
        eoi_token_index=92,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        found = decoder_of(tmp_path)(tokens())
        expected = model(input_ids=tokens(), token_type_ids=torch.zeros_like(tokens())).logits
    assert close(found, expected)


def test_gemma3_defaults_are_transformers(tmp_path):
    """A text_config as short as Google's 4B one means what transformers takes it to mean."""
    text = {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    }
    from edge_export.checkpoint.families import family_of_model_type
    from edge_export.checkpoint.hf_config import decoder_config
    from edge_export.checkpoint.hf_decoder import read_config

    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "gemma3", "eos_token_id": [1, 106], "text_config": text}))
    reference = transformers.AutoConfig.from_pretrained(tmp_path).text_config
    raw, multimodal = read_config(path)
    assert multimodal
    config = decoder_config(raw, family_of_model_type(raw.model_type, "x"), raw.eos_token_id, path)
    layer, last = config.layers[0], config.layers[5]
    assert (config.vocab_size, config.context_tokens) == (262_208, 131_072)
    assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (
        reference.num_attention_heads,
        reference.num_key_value_heads,
        reference.head_dim,
    )
    assert [entry.sliding_window_tokens for entry in config.layers] == [
        1024 if kind == "sliding_attention" else None for kind in reference.layer_types
    ]
    assert (layer.rope.theta, layer.rope.linear_factor) == (10_000.0, 1.0)
    assert (last.rope.theta, last.rope.linear_factor) == (1_000_000.0, 8.0)
    assert config.attention_scale == reference.query_pre_attn_scalar**-0.5
    assert config.tied_embeddings and config.eos_token_ids == (1, 106)


def test_end_tokens_template_and_licence(tmp_path):
    """eos ids come from every file that states them; the template and the card's licence are found."""
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 2]}')
    added = [
        {"id": 7, "content": "<|im_end|>", "special": True},
        {"id": 8, "content": "<end_of_turn>", "special": False},
        {"id": 9, "content": "<|im_start|>", "special": True},
        {"id": 4096, "content": "<|eot_id|>", "special": True},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    (tmp_path / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Model\n")
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.config.eos_token_ids == (5, 2, 7)
    assert (checkpoint.chat_template, checkpoint.licence) == ("d", "apache-2.0")
    (tmp_path / "chat_template.jinja").write_text("newer")
    assert load_checkpoint(tmp_path).chat_template == "newer"


def test_digest_names_the_bytes(tmp_path):
    """The digest is the file's SHA-256 and changes with one byte; size and parameters are right."""
    import hashlib

    model = make_model("llama")
    model.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.digest.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert checkpoint.digest.size_bytes == weights.stat().st_size
    assert checkpoint.parameters == model.num_parameters()
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    assert load_checkpoint(tmp_path).digest != checkpoint.digest


def test_detect(tmp_path):
    """BERT directories go to the encoder loader, everything else to the decoder loader."""
    make_model("llama").save_pretrained(tmp_path / "llama")
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "config.json").write_text('{"model_type": "bert"}')
    assert (detect(tmp_path / "llama"), detect(bert)) == ("decoder", "encoder")
    assert detect(tmp_path / "llama" / "model.safetensors") == "decoder"


BAD_CONFIGS = {
    "family": ({"model_type": "mamba"}, "'mamba' is not supported; supported: llama, mistral, qwen2"),
    "moe": ({"model_type": "mixtral"}, "'mixtral' is not supported"),
    "text": ({"hidden_size": "64"}, "Expected `int`, got `str`"),
    "negative": ({"hidden_size": -64}, "hidden_size is -64; allowed is 1 to"),
    "huge": ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000; allowed"),
    "zero heads": ({"num_attention_heads": 0}, "num_attention_heads is 0; allowed"),
    "odd gqa": ({"num_key_value_heads": 3}, "not a multiple of its 3 key/value heads"),
    "odd head": ({"head_dim": 17}, "the head size 17 of layer 0 is odd"),
    "missing": ({"vocab_size": ...}, "vocab_size is missing"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
    "theta": ({"rope_parameters": {"rope_theta": 0.0}}, "rope_theta is 0.0; allowed"),
    "rope type": ({"rope_parameters": {"rope_theta": "x"}}, "Expected `float | null`, got `str`"),
    "llama3": ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "0 < low_freq_factor"),
    "partial": ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    "bias": ({"attention_bias": True}, "q_proj.bias' (layers.0.q.bias) is missing"),
    "activation": ({"hidden_act": "relu"}, "the activation is 'relu'; llama allows 'silu'"),
    "eos": ({"eos_token_id": 96}, "the special token id 96 is outside the vocabulary of 96"),
    "quantized": ({"quantization_config": {"bits": 4}}, "the weights are quantized"),
    "shape": ({"intermediate_size": 97}, "has shape [96, 64], but the model's configuration needs [97, 64]"),
    "layers": ({"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight'"),
    "untied": ({"tie_word_embeddings": False}, "the tensor 'lm_head.weight' (head.weight) is missing"),
}


@pytest.fixture(scope="module")
def good_llama(tmp_path_factory) -> Path:
    """A whole tiny tied Llama directory; copy before changing."""
    directory = tmp_path_factory.mktemp("llama")
    make_model("llama").save_pretrained(directory)
    return directory


@pytest.mark.parametrize("fault", BAD_CONFIGS)
def test_bad_config_is_one_clear_line(fault, good_llama, tmp_path):
    """Every malformed or unsupported config.json is refused, saying what and where."""
    changes, message = BAD_CONFIGS[fault]
    shutil.copytree(good_llama, tmp_path / "m")
    edit_config(tmp_path / "m", **changes)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "m")
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model_type": 3}', "\xff", "[" * 100_000])
def test_config_that_is_no_config(text, good_llama, tmp_path):
    """A config.json that is not a JSON object with a model_type is refused."""
    shutil.copytree(good_llama, tmp_path / "m")
    (tmp_path / "m" / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(tmp_path / "m")


def test_nothing_to_open(tmp_path):
    """A missing path, an empty directory and a directory without weights each say so."""
    with pytest.raises(CheckpointError, match="no such file or directory"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"neither a config\.json nor a \.gguf"):
        load_checkpoint(tmp_path)
    make_model("llama").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights found"):
        load_checkpoint(tmp_path)
