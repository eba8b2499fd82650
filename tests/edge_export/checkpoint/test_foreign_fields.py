"""Configurations that speak of other mathematics: a warning where transformers ignores it, else refused."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from support.tiny_models import close, logits_of, make_model, tokens, write_gguf

from edge_export.checkpoint.load import load_checkpoint
from edge_export.model.decoder import Decoder
from edge_reasoner.errors import CheckpointError

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def directory(path, case="llama", **fields):
    """A tiny model's directory with other fields in config.json; `...` removes one."""
    make_model(case).save_pretrained(path)
    content = {**json.loads((path / "config.json").read_text()), **fields}
    kept = {name: value for name, value in content.items() if value is not ...}
    (path / "config.json").write_text(json.dumps(kept))
    return path


def computed(checkpoint):
    """The logits of our decoder."""
    with torch.no_grad():
        return Decoder.from_source(checkpoint.config, checkpoint.source)(tokens())


def reference(path):
    """transformers' logits of a directory."""
    return logits_of(
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), tokens()
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("attention_multiplier", 0.5),
        ("residual_multiplier", 0.22),
        ("logits_scaling", 8.0),
        ("scale_emb", 12),
        ("no_rope_layers", [1, 0]),
        ("num_local_experts", 8),
        ("use_qk_norm", True),
        ("final_logit_softcapping", 3.0),
        ("auto_map", {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}),
        ("architectures", ["MyLlamaWithTricks"]),
    ],
)
def test_fields_that_transformers_ignores(field, value, tmp_path):
    """They are named in a warning, and the logits are transformers' all the same."""
    checkpoint = load_checkpoint(directory(tmp_path, **{field: value}))
    named = "made for MyLlamaWithTricks" if field == "architectures" else field
    assert [warning for warning in checkpoint.warnings if named in warning]
    assert close(computed(checkpoint), reference(tmp_path))


def test_neutral_fields_are_no_warning(tmp_path):
    """A factor of one, a count of nothing, a flag that is off."""
    neutral = {"residual_multiplier": 1.0, "num_experts": 0, "use_qk_norm": False, "clip_qkv": None}
    assert load_checkpoint(directory(tmp_path, **neutral)).warnings == ()


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("llama", {"is_causal": False}, "is_causal is false"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, r"quantized with 'awq'"),
        ("llama", {"quantization": {"group_size": 64, "bits": 4}}, r"quantized \(quantization\)"),
        ("llama", {"compression_config": {"quant_method": "pack"}}, r"'pack' \(compression_config\)"),
        (
            "llama",
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}},
            "rotary parameters for 'full_attention' alone",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling and rope_parameters disagree",
        ),
        ("gemma3", {"rope_parameters": {"rope_type": "default"}}, "an entry for 'full_attention'"),
    ],
)
def test_what_would_be_computed_otherwise_is_refused(case, fields, message, tmp_path):
    """A contradiction, or mathematics that the decoder lacks, is one clear line."""
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(directory(tmp_path, case, **fields))


@pytest.mark.parametrize(
    ("case", "fields"),
    [
        (
            "llama",
            {
                "rope_parameters": ...,
                "rope_theta": 1e4,
                "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
                "original_max_position_embeddings": 128,
            },
        ),
        ("gemma3", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ],
)
def test_two_places_for_one_number(case, fields, tmp_path):
    """Where rotary parameters are stated twice, the one counts that transformers takes."""
    path = directory(tmp_path, case, **fields)
    assert close(computed(load_checkpoint(path)), reference(path))


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ({"add_logit_scale": 0.5}, "logit_scale"),
        ({"add_residual_scale": 0.5}, "residual_scale"),
        ({"add_clamp_kqv": 8.0}, "attention.clamp_kqv"),
        ({"add_final_logit_softcapping": 3.0}, "final_logit_softcapping"),
    ],
)
def test_gguf_keys_that_llama_cpp_ignores(extra, key, tmp_path):
    """A key of another architecture is a warning and changes nothing, as in llama.cpp."""
    model = make_model("llama")
    checkpoint = load_checkpoint(write_gguf(model, tmp_path / "m.gguf", extra=extra))
    assert f"llama.{key} is" in checkpoint.warnings[0]
    assert close(computed(checkpoint), logits_of(model, tokens()))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"add_rope_scaling_attn_factors": 1.5}, "attention factor"),
        ({"add_causal_attention": False}, "attention.causal is false"),
    ],
)
def test_gguf_keys_that_llama_cpp_heeds(extra, message, tmp_path):
    """What llama.cpp would compute and the graph would not is refused."""
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(write_gguf(make_model("llama"), tmp_path / "m.gguf", extra=extra))


def test_gguf_ids_that_say_none(tmp_path):
    """4294967295 (-1 in an old converter's hands) is no end and no beginning."""
    none = {"add_eos_token_id": 0xFFFFFFFF, "add_bos_token_id": 0xFFFFFFFF}
    config = load_checkpoint(write_gguf(make_model("llama"), tmp_path / "m.gguf", extra=none)).config
    assert config.bos_token_id is None and 0xFFFFFFFF not in config.eos_token_ids
