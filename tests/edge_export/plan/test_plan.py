"""Plans: formats by recipe and by loss, sizes that come true, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import get_args

import msgspec
import onnx
import pytest
import torch
from support.lowered_decoders import lower_decoder
from support.tiny_models import make_model

from edge_export.checkpoint.load import load_checkpoint
from edge_export.plan.analysis import Analysis
from edge_export.plan.plan import (
    check_decoder,
    contrib_operators,
    needs_losses,
    needs_statistics,
    plan_decoder,
    smallest_plan,
)
from edge_export.plan.recipes import AUTO_BITS_PER_WEIGHT, AUTO_LOSS_TARGET, RECIPES
from edge_export.plan.units import decoder_units
from edge_export.quantize.base import InputStatistics
from edge_reasoner.contract.profile import load_profile
from edge_reasoner.contract.profile.schema import WeightPrecision
from edge_reasoner.errors import InputError, TargetError

PROFILE = load_profile("generic-x86")
SHA = "0" * 64


@pytest.fixture(scope="module", params=["llama", "qwen2-untied"])
def checkpoint(request, tmp_path_factory):
    """A tied and an untied decoder of four layers."""
    folder = tmp_path_factory.mktemp("plan")
    make_model(request.param, num_hidden_layers=4, initializer_range=0.02).save_pretrained(folder)
    return load_checkpoint(folder)


def analysis_of(config, losses) -> Analysis:
    """An analysis with these losses, in the order of the units that have one."""
    names = [unit.name for unit in decoder_units(config) if unit.kind != "embed"]
    return Analysis(100, {}, InputStatistics(torch.ones(64)), {n: losses(i) for i, n in enumerate(names)})


def planned(config, recipe, analysis=None, profile=PROFILE):
    """A plan with a context of 64 tokens."""
    return plan_decoder(config, profile, recipe, 64, analysis, SHA)


def average_bits(plan) -> float:
    """Bits per weight of the units, scales and zero points included."""
    total = sum(u.unit.parameters for u in plan.units)
    width = {"float32": 32.0, "float16": 16.0}[plan.dense]
    bits = sum(u.unit.parameters * (u.format.bits_per_weight if u.format else width) for u in plan.units)
    return bits / total


def test_auto_fills_the_budget_best_gain_first(checkpoint):
    """With losses everywhere, 8 bits go where a byte removes most, up to the bits allowed on average."""
    config = checkpoint.config
    plan = planned(config, "auto", analysis_of(config, lambda i: 2.0**-i))
    assert 5.2 < average_bits(plan) <= AUTO_BITS_PER_WEIGHT
    wide = {u.unit.name for u in plan.units if u.format.bits == 8}
    rates = {
        u.unit.name: 2.0**-i / u.unit.parameters
        for i, u in enumerate(u for u in plan.units if u.unit.kind != "embed")
    }
    chosen = [rates[name] for name in wide if name != "embed"]
    head = rates["head"]
    left = [rate for name, rate in rates.items() if name not in wide and rate != head]
    assert chosen and max(chosen) >= max(left)
    assert config.tied_embeddings or "embed" in wide
    assert {u.quantizer for u in plan.units if u.format.bits == 4} == {"gptq"}
    assert plan.calibration_sha256 == SHA


def test_auto_stops_where_the_loss_is_small_enough(checkpoint):
    """A model that 4 bits do not harm stays at 4 bits; a single sensitive unit alone gets 8."""
    config = checkpoint.config
    plan = planned(config, "auto", analysis_of(config, lambda i: 1e-5))
    assert {u.format.bits for u in plan.units if u.unit.kind != "embed"} == {4}
    plan = planned(config, "auto", analysis_of(config, lambda i: 0.5 if i == 2 else 1e-6))
    wide = [u for u in plan.units if u.format.bits == 8 and u.unit.kind != "embed"]
    assert [u.unit.name for u in wide] == ["layers.0.gate_up"]
    assert wide[0].loss == pytest.approx(0.5 / 256)
    assert plan.to_dict()["estimated_loss_nats"] <= AUTO_LOSS_TARGET


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "auto"])
def test_formats_of_the_fixed_recipes(checkpoint, recipe):
    """fp32 and fp16 are float; int8, int4 and mixed give every unit its own format."""
    plan = planned(checkpoint.config, recipe)
    bits = {u.unit.kind: u.format and u.format.bits for u in plan.units}
    kinds = {"qkv", "o", "gate_up", "down", "head"} | (
        set() if checkpoint.config.tied_embeddings else {"embed"}
    )
    expected = {
        "fp32": dict.fromkeys(kinds),
        "fp16": dict.fromkeys(kinds),
        "int8": dict.fromkeys(kinds, 8),
        "int4": dict.fromkeys(kinds, 4),
        "mixed": {**dict.fromkeys(kinds, 8), "gate_up": 4},
    }
    assert bits == expected[recipe]
    assert plan.dense == ("float16" if recipe == "fp16" else "float32") and plan.compute == "float32"
    assert (plan.calibration_sha256 is not None) == needs_statistics(recipe, "gptq")
    assert not needs_losses(recipe)
    json.dumps(plan.to_dict())


def test_calibration_counts_only_where_something_looks_at_it(checkpoint):
    """Round-to-nearest reads no text, so its plan does not depend on one; auto's order does."""
    plan = plan_decoder(checkpoint.config, PROFILE, "int4", 64, None, SHA, "rtn")
    assert plan.calibration_sha256 is None and not any(u.uses_statistics for u in plan.units)
    assert needs_statistics("auto", "rtn") and not needs_statistics("fp32", "gptq")


def test_the_smallest_plan_is_a_lower_bound(checkpoint):
    """Whatever the analysis says, no plan of a recipe is smaller than the one that memory is checked with."""
    config = checkpoint.config
    for recipe in RECIPES:
        plan = planned(config, recipe, analysis_of(config, lambda i: 2.0**-i))
        assert smallest_plan(config, PROFILE, recipe, 64).weight_bytes <= plan.weight_bytes


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "int4", "mixed"])
def test_planned_bytes_come_true(checkpoint, recipe, tmp_path):
    """The plan's weight bytes are those that the lowering writes, rotary tables aside."""
    plan = planned(checkpoint.config, recipe)
    _, _, stored = lower_decoder(
        checkpoint.config, checkpoint.source, PROFILE, recipe, tmp_path, context_tokens=64
    )
    assert plan.weight_bytes == sum(matrix.size_bytes for matrix in stored.weights.values())


def test_plan_is_the_same_every_time(checkpoint):
    """Equal losses are decided by name, not by chance."""
    config = checkpoint.config
    first, second = (planned(config, "auto", analysis_of(config, lambda i: 0.1)) for _ in range(2))
    assert first == second and first.to_dict() == second.to_dict()


def test_context(checkpoint):
    """The profile's context, bounded by the model's; a chosen one only within the model's."""
    config = checkpoint.config
    assert check_decoder(config, PROFILE, "auto", None) == min(
        PROFILE.export.context_tokens, config.context_tokens
    )
    short = msgspec.structs.replace(
        PROFILE, export=msgspec.structs.replace(PROFILE.export, context_tokens=100)
    )
    assert (
        check_decoder(config, short, "auto", None) == 100 and check_decoder(config, short, "auto", 200) == 200
    )
    for wrong in (8, config.context_tokens + 1):
        with pytest.raises(InputError, match=f"context_tokens={wrong}: allowed: 16 to"):
            check_decoder(config, PROFILE, "auto", wrong)


def test_shapes_that_the_attention_kernel_refuses(checkpoint):
    """Head sizes that are no multiple of 16 and uneven groups are refused before any work."""
    config = checkpoint.config
    layer = config.layers[1]
    for change, message in (
        ({"head_dim": 24}, "layer 1: head_dim 24: GroupQueryAttention takes multiples of 16"),
        ({"num_kv_heads": 3}, "layer 1: 4 heads are no multiple of 3"),
    ):
        wrong = replace(config, layers=(config.layers[0], replace(layer, **change), *config.layers[2:]))
        with pytest.raises(InputError, match=message):
            check_decoder(wrong, PROFILE, "auto", None)


def test_a_board_without_the_operators(checkpoint):
    """A runtime that lacks one of the graph's operators is refused by name; others do not matter."""
    runtime = PROFILE.runtime("onnxruntime")
    for missing, recipe in (("MatMulNBits", "int4"), ("FusedMatMul", "fp32")):
        kept = tuple(op for op in runtime.contrib_ops if op != missing)
        board = msgspec.structs.replace(
            PROFILE, runtimes=(msgspec.structs.replace(runtime, contrib_ops=kept),)
        )
        with pytest.raises(TargetError, match=f"lacks {missing}"):
            check_decoder(checkpoint.config, board, recipe, None)
        other = "fp32" if recipe == "int4" else "int4"
        assert check_decoder(checkpoint.config, board, other, None) > 0


@pytest.mark.parametrize("recipe", ["fp32", "fp16", "int8", "mixed"])
def test_operators_are_those_of_the_graph(checkpoint, recipe, tmp_path):
    """The stated operators are exactly the ones that a graph of the recipe has."""
    path, _, _ = lower_decoder(
        checkpoint.config, checkpoint.source, PROFILE, recipe, tmp_path, context_tokens=64
    )
    nodes = onnx.load(path, load_external_data=False).graph.node
    own = {node.op_type for node in nodes if node.domain or node.op_type == "SimplifiedLayerNormalization"}
    assert own == contrib_operators(checkpoint.config, RECIPES[recipe].quantized)


def test_rows_of_the_recipe_table_are_complete():
    """Names are the keys, what is taken instead exists, and profiles have a word for what each needs."""
    for name, row in RECIPES.items():
        assert row.name == name and row.summary and set(row.instead) <= set(RECIPES) - {name}
        assert row.weights in get_args(WeightPrecision)
