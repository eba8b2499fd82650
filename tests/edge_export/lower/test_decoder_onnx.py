"""Every family's graph on the device backend gives transformers' logits; what the graph file contains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from support.lowered_decoders import MemorySource, decoder_spec, logits_in_pieces, lower_decoder
from support.sequences import OneSequence
from support.tiny_models import CASES, close, logits_of, make_model, tokens

from edge_export.checkpoint.load import load_checkpoint
from edge_export.lower.decoder_onnx import GraphOptions, write_decoder_graph
from edge_export.model.decoder import Decoder
from edge_export.storage.matrices import stored_rows
from edge_reasoner.backends.onnxruntime.decoder import OrtDecoder
from edge_reasoner.contract.profile import list_profiles, load_profile

PROFILE = load_profile("generic-x86")
#: registered by onnxruntime in the standard domain, of which it is no part
ORT_OWN = "SimplifiedLayerNormalization"
#: prefill, decode one by one past every window (7 to 9), several at once again
PIECES = [5, 1, 1, 1, 1, 1, 1, 1, 1, 20, 1, 6]


@pytest.fixture(scope="module", params=sorted(CASES))
def lowered(request, tmp_path_factory):
    """transformers' model, and our fp32 graph of it."""
    folder = tmp_path_factory.mktemp("decoder")
    model = make_model(request.param)
    model.save_pretrained(folder)
    checkpoint = load_checkpoint(folder)
    path, spec, _ = lower_decoder(
        checkpoint.config, checkpoint.source, PROFILE, "fp32", folder, context_tokens=64
    )
    return model, path, spec


def test_logits_equal_transformers(lowered):
    """Prefill, decode steps beyond the sliding window, and several positions kept: transformers' logits."""
    model, path, spec = lowered
    found = logits_in_pieces(path, spec, tokens()[0], PIECES)
    assert close(found, logits_of(model, tokens())[0], relative=2e-4)


def test_only_the_last_positions(lowered):
    """Keeping one position of a prefill, then stepping, gives the same logits as keeping all."""
    model, path, spec = lowered
    expected = logits_of(model, tokens())[0]
    session = OneSequence(OrtDecoder(path, spec, threads=1))
    ids = tokens()[0].numpy()
    for stop, keep in ((30, 1), (31, 1), (40, 3)):
        start = session.length_tokens
        found = torch.from_numpy(session.extend(ids[start:stop], num_logits=keep).copy()).reshape(keep, -1)
        assert close(found, expected[stop - keep : stop], relative=2e-4)
    session.rewind(10)
    again = torch.from_numpy(session.extend(ids[10:11]).copy())
    assert close(again.reshape(-1), expected[10], relative=2e-4)
    session.close()


@pytest.mark.parametrize("sizes", [[40], [1] * 40, [17, 1, 1, 21]])
def test_hidden_states_equal_transformers(lowered, sizes):
    """The final norm's output at the last position and its mean over the prompt, however it is fed."""
    model, path, spec = lowered
    with torch.no_grad():
        expected = model.model(tokens()).last_hidden_state[0]
    decoder = OrtDecoder(path, spec, threads=1)
    cache, total, fed = decoder.new_cache(), torch.zeros(spec.hidden_size), 0
    for piece in tokens()[0].split(sizes):
        step = decoder.extend(cache, piece.numpy(), hidden=True)
        fed += len(piece)
        assert close(torch.from_numpy(step.hidden_last.copy()), expected[fed - 1], relative=2e-4)
        total += torch.from_numpy(step.hidden_sum)
    assert close(total / fed, expected.mean(0), relative=2e-4)
    decoder.close()


def _pruned(checkpoint):
    """The config and tensors of a decoder whose layers differ in heads and widths, as after pruning."""
    config = checkpoint.config
    first, second = config.layers
    narrow = replace(first, num_heads=2, num_kv_heads=1, ffn_width=56)
    pruned = replace(config, layers=(narrow, replace(second, ffn_width=72), narrow))
    torch.manual_seed(4)
    decoder = Decoder(pruned).eval()
    return pruned, decoder


@pytest.mark.parametrize("case", ["llama", "qwen2-untied", "qwen3", "gemma3-softcap"])
@pytest.mark.parametrize("recipe", ["fp32", "mixed"])
def test_layers_of_different_widths(case, recipe, tmp_path):
    """Layers may differ in heads and widths; the graph computes what torch does on the stored weights."""
    make_model(case).save_pretrained(tmp_path)
    config, decoder = _pruned(load_checkpoint(tmp_path))
    source = MemorySource(decoder.state_dict())
    ids = tokens()[0]
    path, spec, stored = lower_decoder(
        config, source, PROFILE, recipe, tmp_path, context_tokens=64, checks=(ids,)
    )
    assert spec.kv_heads == (1, 2, 1)
    found = logits_in_pieces(path, spec, ids, PIECES)
    with torch.no_grad():
        if recipe == "fp32":
            assert close(found, decoder(ids[None])[0], relative=2e-4)
        assert stored.expected_states[0].shape == (40, config.hidden_size)


def graph_of(path: Path) -> onnx.ModelProto:
    """The model file without its external data."""
    return onnx.load(path, load_external_data=False)


@pytest.mark.parametrize("board", list_profiles())
def test_opset_and_operators_suit_the_board(board, tmp_path):
    """For every built-in board and recipe: opset within its bound, only operators that its runtime has."""
    profile = load_profile(board)
    for case in ("qwen2", "gemma3-softcap"):
        make_model(case).save_pretrained(tmp_path)
        checkpoint = load_checkpoint(tmp_path)
        runs = profile.weights_for("causal-lm")
        for recipe in sorted(runs & {"fp32", "fp16", "int8", "mixed"}):
            path, _, _ = lower_decoder(
                checkpoint.config, checkpoint.source, profile, recipe, tmp_path, context_tokens=64
            )
            model = graph_of(path)
            opsets = {entry.domain: entry.version for entry in model.opset_import}
            assert opsets[""] <= profile.max_opset and set(opsets) == {"", "com.microsoft"}
            used = {node.op_type for node in model.graph.node if node.domain == "com.microsoft"}
            assert profile.allowed_ops is None or used | {ORT_OWN} <= profile.allowed_ops
            assert {node.domain for node in model.graph.node} == {"", "com.microsoft"}
            standard = {node.op_type for node in model.graph.node} - used - {ORT_OWN}
            for op in standard:  # raises where the opset does not have it yet
                onnx.defs.get_schema(op, opsets[""], "")


@pytest.mark.parametrize("case", ["llama", "llama-untied-mha"])
@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int4"])
def test_tied_embeddings_exist_once(case, recipe, tmp_path):
    """The data file holds each matrix once: its size is that of the plan's weights plus rotary tables."""
    make_model(case, vocab_size=4096).save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    config = checkpoint.config
    path, spec, stored = lower_decoder(
        config, checkpoint.source, PROFILE, recipe, tmp_path, context_tokens=64
    )
    size = path.with_name("d.data").stat().st_size
    wanted = sum(matrix.size_bytes for matrix in stored.weights.values())
    wanted += sum(part.size_bytes for pair in stored.ropes.values() for part in pair)
    # regions are aligned: at most a page before each
    assert wanted <= size <= wanted + 4096 * 3 * len(stored.weights)
    vocabulary = stored.weights["embed"].size_bytes
    assert ("head" in stored.weights) == (case != "llama")
    layers = sum(m.size_bytes for n, m in stored.weights.items() if n not in ("embed", "head"))
    copies = 1 if case == "llama" else 2
    assert size < copies * vocabulary + layers + 70_000 < (copies + 1) * vocabulary + layers
    found = logits_in_pieces(path, spec, tokens()[0], [40])
    assert found.isfinite().all()


@pytest.mark.parametrize("recipe", ["int8", "int4", "mixed"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("hidden", [80, 96])
def test_widths_that_fill_no_whole_blocks(recipe, tied, hidden, tmp_path):
    """Hidden sizes that end inside a block, or have an odd number of blocks: still torch's logits."""
    heads = {"num_attention_heads": hidden // 16, "num_key_value_heads": 1}
    model = make_model("llama", hidden_size=hidden, intermediate_size=88, tie_word_embeddings=tied, **heads)
    model.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    ids = tokens()[0]
    path, spec, stored = lower_decoder(
        checkpoint.config, checkpoint.source, PROFILE, recipe, tmp_path, context_tokens=64, checks=(ids,)
    )
    head = stored_rows(tmp_path / "d.data", stored.weights["embed" if tied else "head"], 0, spec.vocab_size)
    expected = stored.expected_states[0] @ head.T
    assert close(logits_in_pieces(path, spec, ids, PIECES), expected, relative=2e-4)


def test_graphs_of_two_levels_share_the_weights(tmp_path):
    """Fast and reference graphs differ in nothing but the accuracy level of MatMulNBits."""
    make_model("qwen3").save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    config = checkpoint.config
    path, _, stored = lower_decoder(
        config, checkpoint.source, PROFILE, "int8", tmp_path, context_tokens=64, level=1
    )
    fast = tmp_path / "fast.onnx"
    options = GraphOptions(PROFILE.max_opset, 64, "float32", 4)
    write_decoder_graph(fast, "d.data", config, stored.weights, stored.ropes, options)
    graphs = [graph_of(file).graph for file in (path, fast)]
    external = [
        {
            t.name: {e.key: e.value for e in t.external_data}
            for t in graph.initializer
            if t.data_location == onnx.TensorProto.EXTERNAL
        }
        for graph in graphs
    ]
    assert external[0] == external[1] and {e["location"] for e in external[0].values()} == {"d.data"}
    levels = [
        {a.i for n in graph.node for a in n.attribute if a.name == "accuracy_level"} for graph in graphs
    ]
    assert levels == [{1}, {4}]


def test_the_context_is_the_caches_length(tmp_path):
    """Inputs and outputs follow the manifest's contract; the cache has the planned number of positions."""
    make_model("gemma3").save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    path, spec, _ = lower_decoder(
        checkpoint.config, checkpoint.source, PROFILE, "fp32", tmp_path, context_tokens=48
    )
    graph = graph_of(path).graph
    names = [value.name for value in graph.input]
    wanted = ["input_ids", "seqlens_k", "total_sequence_length", "logits_to_keep", "states_to_keep"]
    assert names[: len(wanted)] == wanted
    past = {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in graph.input}
    for index, (heads, width) in enumerate(zip(spec.kv_heads, spec.head_dim, strict=True)):
        for side in ("key", "value"):
            assert past[f"past_key_values.{index}.{side}"] == ["batch", heads, 48, width]
    assert graph.output[0].name == "logits"
    assert spec == decoder_spec(checkpoint.config, 48)
    assert len({node.name for node in graph.node}) == len(graph.node)


def test_windows_are_biases_shared_by_layers(tmp_path):
    """A window is one bias for all its layers, and none where the context never reaches it."""
    make_model("gemma3").save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    for context_tokens, biases in ((64, 1), (8, 0)):
        path, _, _ = lower_decoder(
            checkpoint.config, checkpoint.source, PROFILE, "fp32", tmp_path, context_tokens=context_tokens
        )
        nodes = graph_of(path).graph.node
        attention = [node for node in nodes if node.op_type == "GroupQueryAttention"]
        assert sum(node.op_type == "Where" for node in nodes) == biases
        assert sum(len(node.input) > 9 for node in attention) == 6 * biases
        assert not any(a.name == "local_window_size" for node in attention for a in node.attribute)
