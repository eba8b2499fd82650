"""The encoder's graph against transformers and against torch on the stored weights."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from support.lowered_encoders import lower_encoder
from support.tiny_berts import SHAPES, embed_with_transformers, make_bert, random_batch

from edge_export.model.encoder import Encoder
from edge_export.plan.encoder import encoder_contrib_ops
from edge_export.plan.recipes import RECIPES
from edge_export.verify.encoder import StoredSource
from edge_reasoner.contract.profile.load import load_profile

LENGTHS = (17, 3, 40, 1, 26)
PROFILE = load_profile("generic-x86")


def open_graph(path: Path) -> onnxruntime.InferenceSession:
    """A plain session of one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(session, ids, mask, types) -> torch.Tensor:
    """The graph's embeddings."""
    feeds = {"input_ids": ids.numpy(), "attention_mask": mask.numpy(), "token_type_ids": types.numpy()}
    return torch.from_numpy(session.run(["embedding"], feeds)[0])


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_agrees_with_transformers(tmp_path, shape, pooling):
    """Padded batches of different lengths, with every token type, differ by at most 1e-5."""
    model = make_bert(tmp_path / "model", shape, pooling)
    lowered = lower_encoder(tmp_path / "model", "fp32", PROFILE, tmp_path)
    ids, mask, types = random_batch(LENGTHS, SHAPES[shape].get("type_vocab_size", 2))
    got = run(open_graph(tmp_path / lowered.variants[0].graph), ids, mask, types)
    assert (got - embed_with_transformers(model, ids, mask, types, pooling)).abs().max() <= 1e-5


@pytest.mark.parametrize("recipe", ["fp16", "int8", "mixed", "int4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_slow_arithmetic_reproduces_the_stored_weights(tmp_path, shape, recipe):
    """With float32 arithmetic the graph equals torch on the dequantized weights to 1e-4."""
    make_bert(tmp_path / "model", shape)
    lowered = lower_encoder(tmp_path / "model", recipe, PROFILE, tmp_path)
    config = lowered.encoder.config
    source = StoredSource(config, tmp_path / "graphs/preprocessor.data", lowered.stored)
    encoder = Encoder.from_source(config, source)
    ids, mask, types = random_batch(LENGTHS, 1)
    with torch.inference_mode():
        expected = encoder(ids, mask)
    got = run(open_graph(tmp_path / lowered.variants[-1].graph), ids, mask, types)
    assert (got - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_fast_and_reference_graph_share_the_weights(tmp_path, recipe):
    """Both graphs name the same regions of one file and differ in nothing but the accuracy level."""
    make_bert(tmp_path / "model", "odd")
    lowered = lower_encoder(tmp_path / "model", recipe, PROFILE, tmp_path)
    graphs = [onnx.load(tmp_path / v.graph, load_external_data=False) for v in lowered.variants]
    levels = []
    for graph in graphs:
        changed = [a for n in graph.graph.node for a in n.attribute if a.name == "accuracy_level"]
        levels.append({attribute.i for attribute in changed})
        for attribute in changed:
            attribute.i = 0
    assert levels == [{4}, {1}]
    assert graphs[0] == graphs[1]
    assert [v.reference for v in lowered.variants] == [False, True]
    assert sorted(p.name for p in (tmp_path / "graphs").iterdir()) == [
        "preprocessor.data",
        "preprocessor.onnx",
        "preprocessor.reference.onnx",
    ]


@pytest.mark.parametrize("recipe", RECIPES)
def test_operators_are_those_announced(tmp_path, recipe):
    """The list checked against the board before any work is exactly what the graphs contain."""
    make_bert(tmp_path / "model", "even")
    lowered = lower_encoder(tmp_path / "model", recipe, PROFILE, tmp_path)
    for variant in lowered.variants:
        model = onnx.load(tmp_path / variant.graph, load_external_data=False)
        used = {node.op_type for node in model.graph.node if node.domain == "com.microsoft"}
        assert used == encoder_contrib_ops(recipe not in ("fp32", "fp16"))
        assert {o.domain: o.version for o in model.opset_import} == {"": 21, "com.microsoft": 1}


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_row_without_tokens_stays_finite(tmp_path, pooling):
    """An all-masked row gives finite numbers and leaves the other rows alone."""
    make_bert(tmp_path / "model", "even", pooling)
    lowered = lower_encoder(tmp_path / "model", "fp32", PROFILE, tmp_path)
    session = open_graph(tmp_path / lowered.variants[0].graph)
    ids, mask, types = random_batch((9, 9), 2)
    alone = run(session, ids[:1], mask[:1], types[:1])
    mask[1] = 0
    both = run(session, ids, mask, types)
    assert torch.isfinite(both).all()
    assert (both[0] - alone[0]).abs().max() <= 1e-6
    if pooling == "mean":
        assert both[1].abs().max() == 0


def test_padding_does_not_matter(tmp_path):
    """The same sentence alone and beside a longer one gives the same embedding."""
    make_bert(tmp_path / "model", "even")
    lowered = lower_encoder(tmp_path / "model", "int8", PROFILE, tmp_path)
    session = open_graph(tmp_path / lowered.variants[0].graph)
    ids, mask, types = random_batch((5, 33), 2)
    together = run(session, ids, mask, types)
    alone = run(session, ids[:1, :5], mask[:1, :5], types[:1, :5])
    assert (together[0] - alone[0]).abs().max() <= 1e-5
