"""The torch decoder: its paths (cached, batched, streamed) agree, and it can be trained and narrowed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.tiny_models import CASES, HIDDEN, VOCAB, close, logits_of, make_model, tokens
from torch.nn.utils import parametrize

from edge_export.checkpoint.load import load_checkpoint
from edge_export.model.config import DecoderConfig, TensorSource
from edge_export.model.decoder import Decoder, KvCache
from edge_export.model.layer import attention_mask, layer_forward
from edge_export.model.rope import rope_tables
from edge_export.model.stream import embed_tokens, head_chunks, layer_weights, original_head, stream_hidden
from edge_export.model.tensors import parameter_count, tensor_shapes

SHAPES_OF_LAYERS = ["llama", "mistral-window", "qwen2-window", "qwen3", "gemma3", "gemma3-softcap"]


@pytest.fixture(scope="module", params=SHAPES_OF_LAYERS)
def opened(request, tmp_path_factory) -> tuple[DecoderConfig, TensorSource]:
    """Config and weights of a tiny checkpoint."""
    directory = tmp_path_factory.mktemp("model")
    make_model(request.param).save_pretrained(directory)
    checkpoint = load_checkpoint(directory)
    return checkpoint.config, checkpoint.source


def test_cache_equals_whole(opened):
    """Feeding tokens in pieces through a KV cache gives the logits of the whole sequence, past the window."""
    decoder = Decoder.from_source(*opened)
    cache, ids = KvCache(), tokens(40)
    with torch.no_grad():
        whole = decoder(ids)
        pieces = [decoder(piece, cache) for piece in ids.split([13, 1, 1, 20, 5], dim=1)]
        assert cache.tokens == 40
        assert close(torch.cat(pieces, 1), whole)
        last = decoder(ids, last_only=True)
    assert last.shape == (1, 1, VOCAB) and close(last[:, 0], whole[:, -1])


def test_batch_equals_single(opened):
    """Sequences of a batch do not see each other."""
    decoder = Decoder.from_source(*opened)
    first, second = tokens(seed=1), tokens(seed=2)
    with torch.no_grad():
        both = decoder(torch.cat((first, second)))
        assert close(both[0], decoder(first)[0]) and close(both[1], decoder(second)[0])


def test_streamed_equals_whole(opened):
    """One layer at a time, several sequences, vocabulary in chunks: the same hidden states and logits."""
    config, source = opened
    decoder = Decoder.from_source(config, source)
    sequences = [tokens(31)[0], tokens(5, seed=3)[0]]
    hidden = stream_hidden(config, source, sequences)
    head = original_head(config, source)
    for states, ids in zip(hidden, sequences, strict=True):
        with torch.no_grad():
            assert close(states, decoder.hidden_states(ids[None])[0])
            logits = torch.cat([rows for _, rows in head_chunks(config, head, states, chunk_rows=17)], -1)
            assert close(logits, decoder(ids[None])[0])
    starts = [start for start, _ in head_chunks(config, head, hidden[0], chunk_rows=40)]
    assert starts == [0, 40, 80]


def test_stream_shows_each_linears_input(opened):
    """The hooks see every layer's weights, its inputs, and what each linear multiplies."""
    config, source = opened
    ids = tokens(11)[0]
    visits, traces = [], {}
    stream_hidden(
        config,
        source,
        [ids],
        on_layer=visits.append,
        on_trace=lambda i, s, trace: traces.update({(i, s): trace}),
    )
    assert [visit.index for visit in visits] == list(range(len(config.layers)))
    assert torch.equal(visits[0].inputs[0], embed_tokens(config, source, ids))
    for visit, layer in zip(visits, config.layers, strict=True):
        trace = traces[visit.index, 0]
        assert trace.attn_in.shape == trace.mlp_in.shape == trace.hidden_out.shape == (11, HIDDEN)
        assert trace.o_in.shape == (11, layer.num_heads * layer.head_dim)
        assert trace.down_in.shape == (11, layer.ffn_width)
        again = layer_forward(layer, config, visit.weights, visit.inputs[0])
        assert torch.equal(again.hidden_out, trace.hidden_out)
        up = torch.nn.functional.linear(trace.mlp_in, visit.weights["up.weight"])
        assert up.shape == trace.down_in.shape


def test_stream_runs_replaced_weights(opened):
    """Weights returned by `on_layer` take the place of the checkpoint's, from that layer on."""
    config, source = opened
    ids = tokens(9)[0]
    decoder = Decoder.from_source(config, source)
    with torch.no_grad():
        decoder.layers[1].down.weight.zero_()
        expected = decoder.hidden_states(ids[None])[0]

    def zero_down(visit):
        if visit.index != 1:
            return None
        return {**visit.weights, "down.weight": torch.zeros_like(visit.weights["down.weight"])}

    found = stream_hidden(config, source, [ids], on_layer=zero_down)[0]
    assert close(found, expected) and not close(found, stream_hidden(config, source, [ids])[0], 1e-2)


def test_names_are_canonical(opened):
    """Parameter names and shapes of the module, of the source and of `tensor_shapes` are the same."""
    config, source = opened
    shapes = tensor_shapes(config)
    decoder = Decoder(config)
    assert {name: tuple(p.shape) for name, p in decoder.named_parameters()} == shapes
    assert list(source.names()) == list(shapes)
    assert {name: source.shape(name) for name in shapes} == shapes
    assert parameter_count(config) == sum(p.numel() for p in decoder.parameters())
    name = "layers.0.q.weight"
    assert torch.equal(source.rows(name, 3, 9), source.get(name)[3:9])
    assert layer_weights(config, source, 0).keys() == {n[9:] for n in shapes if n.startswith("layers.0.")}


def test_gradients_equal_transformers(tmp_path):
    """Gradients of the loss equal transformers', through grouped heads and the tied embedding."""
    model = make_model("llama").train()
    model.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    decoder = Decoder.from_source(checkpoint.config, checkpoint.source).train()
    ids = tokens(24).clamp(min=1)  # transformers gives the padding token no gradient
    model(ids, labels=ids).loss.backward()
    loss = torch.nn.functional.cross_entropy(decoder(ids)[0, :-1], ids[0, 1:])
    loss.backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    pairs = {
        "embed.weight": model.model.embed_tokens,
        "layers.0.k.weight": model.model.layers[0].self_attn.k_proj,
        "layers.1.down.weight": model.model.layers[1].mlp.down_proj,
        "layers.1.mlp_norm.weight": model.model.layers[1].post_attention_layernorm,
    }
    found = dict(decoder.named_parameters())
    for name, module in pairs.items():
        assert close(found[name].grad, module.weight.grad, 1e-3), name


class _Zero(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 0


def test_parametrized_weights_take_part(tmp_path):
    """A parametrization on a linear's weight (as QAT and masks use) changes what the layer computes."""
    make_model("llama").save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    decoder = Decoder.from_source(checkpoint.config, checkpoint.source)
    with torch.no_grad():
        before = decoder(tokens())
        parametrize.register_parametrization(decoder.layers[0].up, "weight", _Zero())
        after = decoder(tokens())
        parametrize.remove_parametrizations(decoder.layers[0].up, "weight", leave_parametrized=False)
        assert torch.equal(decoder(tokens()), before)
    assert not close(after, before, 1e-2)


def test_layers_may_differ_in_width(tmp_path):
    """Dropping dead FFN channels and a dead head group of one layer leaves the logits as they were."""
    model = make_model("llama-untied-mha")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 64:] = 0
        model.model.layers[1].self_attn.o_proj.weight[:, 32:] = 0  # heads 2 and 3
    model.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    config = checkpoint.config
    narrow = replace(config.layers[1], ffn_width=64, num_heads=2, num_kv_heads=2)
    pruned = Decoder(replace(config, layers=(config.layers[0], narrow)))
    kept = {"gate": (64, None), "up": (64, None), "down": (None, 64), "o": (None, 32)}
    kept |= dict.fromkeys("qkv", (32, None))
    state = {}
    for name in tensor_shapes(config):
        weight = checkpoint.source.get(name)
        rows, columns = kept.get(name.split(".")[-2], (None, None)) if ".1." in name else (None, None)
        state[name] = weight[:rows, :columns] if weight.dim() == 2 else weight
    pruned.load_state_dict(state)
    with torch.no_grad():
        assert close(pruned(tokens()), logits_of(model, tokens()))


def test_rope_tables_equal_transformers():
    """The rotary tables that the graphs will carry equal transformers' for every kind of scaling."""
    for case in ("llama", "llama3-rope", "llama-linear"):
        model = make_model(case)
        positions = torch.arange(256)
        cos, sin = model.model.rotary_emb(torch.zeros(1, 1), positions[None])
        rope = _rope_of(case)
        found_cos, found_sin = rope_tables(rope, 16, positions)
        assert found_cos.shape == (256, 8) and found_cos.dtype == torch.float32
        assert torch.allclose(found_cos, cos[0, :, :8], atol=1e-6)
        assert torch.allclose(found_sin, sin[0, :, :8], atol=1e-6)


def _rope_of(case: str):
    from edge_export.model.config import Rope

    if case == "llama3-rope":
        return Rope(10_000.0, 1.0, 8.0, 1.0, 4.0, 64)
    return Rope(5e4, 4.0) if case == "llama-linear" else Rope(10_000.0)


def test_attention_mask():
    """A query sees itself and earlier tokens within the window; None where plain causal says the same."""
    assert attention_mask(5, 5, None) is None and attention_mask(5, 5, 5) is None
    assert attention_mask(4, 4, 2).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    assert attention_mask(2, 4, None).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert attention_mask(1, 4, 3).int().tolist() == [[0, 1, 1, 1]]


def test_every_case_is_covered():
    """The families of the support module are the supported ones."""
    from edge_export.checkpoint.families import FAMILIES

    assert {family.name for family in FAMILIES} == {
        case.split("-")[0].replace("llama3", "llama") for case in CASES
    }
