"""What the exporter writes passes the device's own check of graphs, whatever family, recipe and width."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from support.lowered_decoders import decoder_spec, lower_decoder
from support.lowered_encoders import lower_encoder
from support.tiny_berts import SHAPES, make_bert
from support.tiny_models import CASES, make_model

from edge_export.checkpoint.load import load_checkpoint
from edge_export.lower.decoder_onnx import GraphOptions, store_rope_tables, write_decoder_graph
from edge_export.storage.external_data import ExternalData
from edge_export.storage.matrices import DenseMatrix, store_dense, stored_rows
from edge_reasoner.contract.bundle.graph_check import check_graph
from edge_reasoner.contract.bundle.manifest import DecoderSpec, EncoderSpec
from edge_reasoner.contract.bundle.onnx_scan import scan_graph
from edge_reasoner.contract.profile import load_profile

PROFILE = load_profile("generic-x86")
RECIPES = ("fp32", "fp16", "int8", "mixed", "int4")


def passes(path: Path, spec: DecoderSpec | EncoderSpec) -> None:
    """Canonical, as the onnx package writes it, and accepted with all its files."""
    data = path.read_bytes()
    assert onnx.load_from_string(data).SerializeToString(deterministic=True) == data
    files = {file.name: file.stat().st_size for file in path.parent.iterdir() if file.is_file()}
    model = scan_graph(data, path.name)
    assert check_graph(data, path.name, spec, files) == model.locations
    assert len(model.locations) == 1


@pytest.mark.parametrize("case", sorted(CASES))
def test_decoders_of_every_family(case, tmp_path):
    """Windows that bite and that do not, tied and untied, with norms and biases of every kind."""
    make_model(case).save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    for recipe in RECIPES:
        for context_tokens in (64, 16) if recipe == "fp32" else (64,):
            path, spec, _ = lower_decoder(
                checkpoint.config,
                checkpoint.source,
                PROFILE,
                recipe,
                tmp_path,
                context_tokens=context_tokens,
                level=4,
            )
            passes(path, spec)


@pytest.mark.parametrize("tied", [True, False])
def test_widths_that_fill_no_whole_blocks(tied, tmp_path):
    """Padded blocks are cut off again."""
    heads = {"num_attention_heads": 5, "num_key_value_heads": 1}
    make_model(
        "llama", hidden_size=80, intermediate_size=88, tie_word_embeddings=tied, **heads
    ).save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    for recipe in ("int8", "int4"):
        path, spec, _ = lower_decoder(
            checkpoint.config, checkpoint.source, PROFILE, recipe, tmp_path, context_tokens=64
        )
        passes(path, spec)


def test_float16_arithmetic(tmp_path):
    """A graph for a processor that computes in float16, its cache too."""
    make_model("gemma3-softcap").save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    config = checkpoint.config
    _, _, stored = lower_decoder(config, checkpoint.source, PROFILE, "fp16", tmp_path, context_tokens=32)
    assert all(isinstance(matrix, DenseMatrix) for matrix in stored.weights.values())
    with ExternalData(tmp_path / "h.data") as data:
        weights = {
            name: store_dense(data, stored_rows(tmp_path / "d.data", matrix, 0, matrix.shape[0]), "float16")
            for name, matrix in stored.weights.items()
        }
        ropes = store_rope_tables(data, config, 32, "float16")
    options = GraphOptions(PROFILE.max_opset, 32, "float16", 1)
    write_decoder_graph(tmp_path / "h.onnx", "h.data", config, weights, ropes, options)
    passes(tmp_path / "h.onnx", decoder_spec(config, 32, "float16"))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_encoders(shape, pooling, tmp_path):
    """Both poolings, every recipe, fast and reference graph."""
    make_bert(tmp_path / "model", shape, pooling)
    for recipe in RECIPES:
        lowered = lower_encoder(tmp_path / "model", recipe, PROFILE, tmp_path / recipe)
        for variant in lowered.variants:
            passes(tmp_path / recipe / variant.graph, lowered.spec)
