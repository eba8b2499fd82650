"""What calibration text says: importance equals torch's own hooks, losses rank as the measured divergence."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import spearmanr
from support.lowered_decoders import MemorySource, quiet
from support.tiny_models import make_model, tokens

from edge_export.checkpoint.load import load_checkpoint
from edge_export.model.decoder import Decoder
from edge_export.plan.analysis import analyse_importance, analyse_losses
from edge_export.plan.units import LAYER_UNITS, decoder_units, small_parameters
from edge_export.quantize import make_quantizer
from edge_export.quantize.base import InputStatistics
from edge_export.quantize.formats import BlockFormat

INT4 = BlockFormat(4, 32, False)
BATCHES = [tokens(150, seed)[0] for seed in (5, 6, 7, 8)]


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """A random model with layers of unequal influence, and its torch Decoder."""
    folder = tmp_path_factory.mktemp("analysis")
    model = make_model("llama-untied-mha", num_hidden_layers=4, initializer_range=0.08)
    with torch.no_grad():
        for layer, factor in zip(model.model.layers, (1.0, 4.0, 0.4, 2.0), strict=True):
            layer.mlp.down_proj.weight.mul_(factor)
            layer.self_attn.o_proj.weight.mul_(3 * factor)
    model.save_pretrained(folder)
    checkpoint = load_checkpoint(folder)
    return checkpoint.config, Decoder.from_source(checkpoint.config, checkpoint.source)


def log_probabilities(decoder: Decoder) -> torch.Tensor:
    """log p [tokens, vocab] over the batches."""
    with torch.no_grad():
        return torch.cat([decoder(ids[None])[0].log_softmax(-1) for ids in BATCHES])


def divergence(reference: torch.Tensor, changed: Decoder) -> float:
    """KL(reference ‖ changed), nats per token."""
    other = log_probabilities(changed)
    return float((reference.exp() * (reference - other)).sum(-1).mean())


def replaced(config, decoder, importance, names) -> Decoder:
    """The decoder with these units at 4 bits."""
    parts = dict(LAYER_UNITS)
    state = {name: value.clone() for name, value in decoder.state_dict().items()}
    for name in names:
        *at, kind = name.split(".")
        for part in parts.get(kind, (kind,)):
            key = ".".join([*at, part, "weight"])
            inputs = InputStatistics(importance[name])
            state[key] = make_quantizer("searched").quantize(state[key], INT4, inputs).dequantize()
    return Decoder.from_source(config, MemorySource(state))


def test_losses_rank_as_the_measured_divergence(unequal):
    """Putting one unit at a time at 4 bits in torch: its KL has the estimate's order, and its size."""
    config, decoder = unequal
    source = MemorySource(decoder.state_dict())
    analysis = analyse_losses(config, source, BATCHES, make_quantizer("searched"), INT4, 0, quiet)
    names = [unit.name for unit in decoder_units(config) if unit.kind != "embed"]
    assert set(analysis.int4_losses) == set(names) and analysis.tokens == 600
    reference = log_probabilities(decoder)
    measured = [
        divergence(reference, replaced(config, decoder, analysis.importance, [name])) for name in names
    ]
    estimated = [analysis.int4_losses[name] for name in names]
    assert spearmanr(measured, estimated).statistic >= 0.85
    ratios = {n: e / m for n, e, m in zip(names, estimated, measured, strict=True)}
    assert 0.9 < ratios.pop("head") < 1.1
    # Errors at different positions are taken as independent: before the second layer's strong attention,
    # which averages over positions, the estimate is low.
    assert all(0.05 < r < 2 for r in ratios.values())
    assert all(r > 0.5 for name, r in ratios.items() if not name.startswith("layers.0."))
    assert max(measured) > 20 * min(measured)  # there was something to rank
    together = divergence(reference, replaced(config, decoder, analysis.importance, names))
    assert together / 3 <= sum(estimated) <= 3 * together


def test_losses_are_deterministic_and_draw_from_the_seed(unequal):
    """The same seed gives the same losses; another one nearly the same."""
    config, decoder = unequal
    source = MemorySource(decoder.state_dict())
    runs = [
        analyse_losses(config, source, BATCHES, make_quantizer("rtn"), INT4, seed, quiet).int4_losses
        for seed in (0, 0, 1)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert sum(runs[2].values()) == pytest.approx(sum(runs[0].values()), rel=0.3)


@pytest.mark.parametrize("case", ["llama", "gemma3-softcap"])
def test_importance_is_the_mean_square_of_each_input(case, tmp_path):
    """Importance equals the mean squares that hooks on transformers' own linears see."""
    model = make_model(case)
    model.save_pretrained(tmp_path)
    checkpoint = load_checkpoint(tmp_path)
    analysis = analyse_importance(checkpoint.config, checkpoint.source, BATCHES, quiet)
    watched = {
        "layers.1.qkv": model.model.layers[1].self_attn.q_proj,
        "layers.1.o": model.model.layers[1].self_attn.o_proj,
        "layers.0.gate_up": model.model.layers[0].mlp.gate_proj,
        "layers.0.down": model.model.layers[0].mlp.down_proj,
        "head": model.lm_head,
    }
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in watched}
    for name, module in watched.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0][0]))
    with torch.no_grad():
        for ids in BATCHES:
            model(ids[None])
    for name, parts in seen.items():
        inputs = torch.cat(parts)
        torch.testing.assert_close(analysis.importance[name], inputs.square().mean(0), rtol=1e-3, atol=1e-4)
    inputs = torch.cat(seen["head"])
    correlation = inputs.T @ inputs / len(inputs)
    torch.testing.assert_close(analysis.head_inputs.correlation[0], correlation, rtol=1e-3, atol=1e-3)
    assert not analysis.int4_losses and analysis.tokens == 600


@pytest.mark.parametrize("case", ["llama", "qwen2-untied", "qwen3", "gemma3"])
def test_units_and_small_parameters_are_the_whole_model(case, tmp_path):
    """Units and what lies outside them add up to transformers' own parameter count."""
    model = make_model(case)
    model.save_pretrained(tmp_path)
    config = load_checkpoint(tmp_path).config
    units = list(decoder_units(config))
    assert len({unit.name for unit in units}) == len(units)
    counted = sum(unit.parameters for unit in units) + small_parameters(config)
    assert counted == sum(p.numel() for p in model.parameters())
