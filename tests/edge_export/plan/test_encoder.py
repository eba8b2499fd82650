"""How an encoder is stored under each recipe."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_export.model.config import EncoderConfig
from edge_export.model.encoder import encoder_tensor_shapes
from edge_export.plan.encoder import (
    AUTO_LOSS,
    EncoderAnalysis,
    encoder_weights,
    matrix_kind,
    plan_encoder,
    smallest_encoder_plan,
)
from edge_export.plan.recipes import RECIPES
from edge_export.quantize.formats import BlockFormat
from edge_reasoner.contract.profile import load_profile

CONFIG = EncoderConfig(
    family="bert",
    vocab_size=30522,
    hidden_size=384,
    num_layers=6,
    num_heads=12,
    ffn_width=1536,
    norm_epsilon=1e-12,
    context_tokens=256,
    token_types=2,
    pooling="mean",
)


PROFILE = load_profile("generic-x86")


def analysis_of(int8_loss, losses) -> EncoderAnalysis:
    """An analysis with these losses, by the matrices' number."""
    names = [name.removesuffix(".weight") for name, _ in encoder_weights(CONFIG) if matrix_kind(name)]
    return EncoderAnalysis(8, int8_loss, {name: losses(index) for index, name in enumerate(names)})


def planned(recipe, config=CONFIG):
    """A plan; with some losses, where the recipe asks for any."""
    return plan_encoder(config, PROFILE, recipe, analysis_of(1e-4, lambda index: 1e-5))


def formats_by_kind(plan) -> dict:
    """The format of each kind of matrix; all of a kind have one."""
    found: dict = {}
    for weight in plan.weights:
        if (kind := matrix_kind(weight.name)) is not None:
            assert found.setdefault(kind, weight.format) == weight.format
    return found


@given(st.integers(1, 4096))
def test_int8_block_is_the_cheapest_that_kernels_take(width):
    """Padded codes and scales of a row take the fewest bytes among all allowed blocks, up to 128."""
    plan = planned("int8", replace(CONFIG, hidden_size=width, vocab_size=8, num_layers=1))
    fmt = formats_by_kind(plan)["qkv"]
    assert isinstance(fmt, BlockFormat) and fmt.block_size <= 128

    def row_bytes(block):
        return -(-width // block) * (block + 4)

    assert row_bytes(fmt.block_size) == min(row_bytes(block) for block in (16, 32, 64, 128))


@pytest.mark.parametrize("width", [384, 512, 768, 1024])
def test_int8_is_a_quarter_at_every_common_width(width):
    """At BERT's usual widths scales add at most 3.2 % to the codes."""
    formats = formats_by_kind(planned("int8", replace(CONFIG, hidden_size=width, ffn_width=4 * width)))
    assert all(fmt.bits_per_weight <= 8 * 1.032 for fmt in formats.values())


def test_mixed_has_4_bit_words_and_8_bit_layers():
    """int4 means 4 bits everywhere; mixed keeps 8 for the layers, in int8's own blocks."""
    int8, mixed, int4 = (formats_by_kind(planned(recipe)) for recipe in ("int8", "mixed", "int4"))
    assert {fmt.bits for fmt in int4.values()} == {4} and {fmt.bits for fmt in int8.values()} == {8}
    assert dict(mixed) == {**int8, "word": int4["word"]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_stacked_weight_and_its_tensors_have_one_format(recipe):
    """Every canonical tensor is in exactly one weight of the graph, so it is stored in one format."""
    plan = planned(recipe)
    assert [(weight.name, weight.tensors) for weight in plan.weights] == list(encoder_weights(CONFIG))
    seen = [tensor for weight in plan.weights for tensor in weight.tensors]
    assert sorted(seen) == sorted(encoder_tensor_shapes(CONFIG))


@pytest.mark.parametrize("recipe", RECIPES)
def test_vectors_are_never_quantized(recipe):
    """Biases and norms stay float under every recipe."""
    for weight in planned(recipe).weights:
        assert len(weight.shape) == 2 or isinstance(weight.format, str), weight.name


def test_auto_narrows_what_costs_least_for_what_it_saves():
    """From int8 down to 4 bits, the least loss per byte first, and never beyond the loss allowed."""
    int8 = planned("int8")
    none = plan_encoder(CONFIG, PROFILE, "auto", analysis_of(2e-4, lambda index: 1.0))
    assert formats_by_kind(none) == formats_by_kind(int8) and none.loss == 2e-4
    # Matrix 0 are the words: dearer than all others together, and by far the largest.
    some = plan_encoder(CONFIG, PROFILE, "auto", analysis_of(2e-4, lambda index: 1e-6 * index or 1e-3))
    narrow = [w.name for w in some.weights if isinstance(w.format, BlockFormat) and w.format.bits == 4]
    assert "embed.word.weight" not in narrow and 0 < len(narrow) < 24
    assert some.loss <= AUTO_LOSS and some.weight_bytes < int8.weight_bytes
    every = plan_encoder(CONFIG, PROFILE, "auto", analysis_of(0.0, lambda index: 0.0))
    assert every.weight_bytes == smallest_encoder_plan(CONFIG, PROFILE, "auto").weight_bytes
    assert every.weight_bytes == planned("int4").weight_bytes


def test_auto_goes_below_its_loss_only_for_a_size_limit():
    """A limit on bytes narrows more matrices, as few as the limit takes."""
    analysis = analysis_of(3e-4, lambda index: 1e-3)
    free = plan_encoder(CONFIG, PROFILE, "auto", analysis)
    limit = free.weight_bytes - 2_000_000
    tight = plan_encoder(CONFIG, PROFILE, "auto", analysis, limit_bytes=limit)
    assert limit - 8_000_000 < tight.weight_bytes <= limit < free.weight_bytes
    assert tight.loss > AUTO_LOSS
