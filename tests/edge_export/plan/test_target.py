"""What profiles allow: every built-in board with every recipe, and each kind of refusal."""

from __future__ import annotations

import msgspec
import pytest
import torch

from edge_export.model.config import DecoderConfig, EncoderConfig, LayerConfig, Rope
from edge_export.plan.analysis import Analysis
from edge_export.plan.encoder import EncoderAnalysis, encoder_weights, plan_encoder
from edge_export.plan.plan import check_decoder, plan_decoder
from edge_export.plan.recipes import RECIPES
from edge_export.plan.target import PROVIDERS, Provider, choose_target
from edge_export.plan.units import decoder_units
from edge_export.quantize.base import InputStatistics
from edge_reasoner.contract.profile import list_profiles, load_profile
from edge_reasoner.contract.profile.schema import ExportDefaults, Limit, Precision
from edge_reasoner.errors import TargetError

NO_OPERATORS = {True: frozenset(), False: frozenset()}
PI = load_profile("raspberry-pi-5")
ZERO = load_profile("raspberry-pi-zero-2w")
ENCODER = EncoderConfig(
    family="bert", vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, ffn_width=128,
    norm_epsilon=1e-12, context_tokens=64, token_types=2, pooling="mean",
)  # fmt: skip


def replaced(profile, **changes):
    """The profile with other fields."""
    return msgspec.structs.replace(profile, **changes)


def target(profile, task="causal-lm", recipe="int8", operators=NO_OPERATORS, parameters=1000, **more):
    """The choice for a model of these properties."""
    return choose_target(profile, task, recipe, operators=operators, parameters=parameters, **more)


@pytest.fixture(scope="module")
def decoder() -> DecoderConfig:
    """A decoder of two layers."""
    layer = LayerConfig(num_heads=4, num_kv_heads=2, head_dim=16, ffn_width=128, rope=Rope(theta=10_000.0))
    return DecoderConfig(
        family="llama", vocab_size=100, hidden_size=64, layers=(layer, layer), norm_epsilon=1e-5,
        context_tokens=128, activation="silu", tied_embeddings=True,
    )  # fmt: skip


def analysis(config) -> Analysis:
    """Losses of every unit."""
    losses = {unit.name: 0.01 for unit in decoder_units(config)}
    return Analysis(10, {}, InputStatistics(torch.ones(64)), losses)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("board", list_profiles())
def test_every_board_and_recipe_plans_or_is_refused_in_one_line(board, recipe, decoder):
    """Decoders and encoders; whatever is planned computes in what the chosen provider computes in."""
    profile = load_profile(board)
    losses = {name.removesuffix(".weight"): 1e-6 for name, _ in encoder_weights(ENCODER)}
    for task, make in (
        ("causal-lm", lambda: plan_decoder(decoder, profile, recipe, 64, analysis(decoder), None)),
        ("encoder", lambda: plan_encoder(ENCODER, profile, recipe, EncoderAnalysis(1, 0.0, losses))),
    ):
        if RECIPES[recipe].weights in profile.weights_for(task):
            plan = make()
            assert (plan.recipe, plan.execution_provider) == (recipe, "CPUExecutionProvider")
            assert plan.processor == "cpu" and getattr(plan, "compute", "float32") == "float32"
            assert len(plan.notes) == len(profile.accelerators)
        else:
            with pytest.raises(TargetError) as caught:
                make()
            message = str(caught.value)
            assert message.startswith(
                f"recipe='{recipe}': profile '{board}' does not run it for {task} on cpu"
            )
            assert "possible: auto, int8, int4, mixed" in message and "\n" not in message


@pytest.mark.parametrize("board", [b for b in list_profiles() if load_profile(b).accelerators])
def test_unused_accelerators_are_explained(board):
    """An accelerator that runs no decoders is named with the profile's reason and what works instead."""
    profile = load_profile(board)
    notes = target(profile).notes
    for accelerator in profile.accelerators:
        (note,) = (note for note in notes if note.startswith(f"{accelerator.name} is not used: "))
        if not accelerator.runs_decoder_lm:
            limit = next(x for x in profile.cannot if x.about("causal-lm", accelerator.name))
            assert limit.what in note and limit.why in note and limit.instead in note


def test_auto_takes_what_the_board_runs():
    """A board without 4 bits: auto is int8 there, and says so; a board with nothing for a task is named."""
    only8 = replaced(PI, precisions=(Precision(task="causal-lm", processor="cpu", weights=("int8", "fp32")),))
    chosen = target(only8, recipe="auto")
    assert chosen.recipe.name == "int8" and "recipe auto is int8 here" in chosen.notes[-1]
    with pytest.raises(TargetError, match=r"recipe='int4': .* possible: auto, fp32, int8$"):
        target(only8, recipe="int4")
    with pytest.raises(TargetError, match=r"no .*precisions.* for encoder on cpu; it has: causal-lm on cpu"):
        target(only8, task="encoder")


def test_limits_are_enforced():
    """A row refuses what meets all its conditions, and says why and what works; a bare row informs."""
    with pytest.raises(TargetError, match=r"cannot run decoders above about 200 million parameters \(512 MB"):
        target(ZERO, parameters=200_000_001)
    assert target(ZERO, parameters=200_000_000) and target(ZERO, task="encoder", parameters=10**9)
    words = {"what": "do it", "why": "a reason", "instead": "something else"}
    for conditions, refused, taken in (
        ({"task": "encoder"}, {"task": "encoder"}, {}),
        ({"operators": ("MatMulNBits",)}, {"operators": {True: frozenset({"MatMulNBits"})}}, {}),
        ({"task": "causal-lm", "processor": "cpu"}, {}, {"task": "encoder"}),
        ({"backend": "onnxruntime", "parameters_above": 5}, {"parameters": 6}, {"parameters": 5}),
    ):
        board = replaced(PI, cannot=(Limit(**words, **conditions), Limit(**words)))
        with pytest.raises(TargetError, match=r"cannot do it \(a reason\); instead: something else"):
            target(board, **refused)
        assert target(board, **taken).processor == "cpu"


def test_runtimes_and_caches_that_do_not_suit():
    """A board whose onnxruntime is too old, has no provider of ours, or keeps its cache in another type."""
    runtime = PI.runtime("onnxruntime")
    old = replaced(PI, runtimes=(msgspec.structs.replace(runtime, newest_version="1.9.1"),))
    with pytest.raises(TargetError, match=r"onnxruntime 1\.9\.1 is its newest; graphs need 1\.23\.2"):
        target(old)
    other = replaced(
        PI, runtimes=(msgspec.structs.replace(runtime, execution_providers=("VendorProvider",)),)
    )
    with pytest.raises(TargetError, match="offers VendorProvider; graphs are written for onnxruntime's CPU"):
        target(other)
    half = replaced(PI, export=ExportDefaults(kv_dtype="float16"))
    with pytest.raises(TargetError, match=r"export\.kv_dtype 'float16': CPUExecutionProvider takes float32"):
        target(half)
    assert target(half, task="encoder").execution_provider == "CPUExecutionProvider"


def test_float16_arithmetic_follows_provider_accelerator_and_cache():
    """Only a provider with float16 kernels, on an accelerator that has fp16, computes in float16."""
    orin = load_profile("jetson-orin")
    half = replaced(orin, export=ExportDefaults(kv_dtype="float16"))
    cuda = {"CUDAExecutionProvider": Provider("gpu", True, ("float32", "float16")), **PROVIDERS}
    chosen = target(half, recipe="fp16", providers=cuda)
    assert (chosen.processor, chosen.compute, chosen.kv_dtype) == ("ampere-gpu", "float16", "float16")
    assert chosen.execution_provider == "CUDAExecutionProvider"
    assert target(half, recipe="int8", providers=cuda).compute == "float32"
    assert target(orin, recipe="fp16", providers=cuda).compute == "float32"
    assert target(orin, recipe="fp16").compute == "float32"
    assert target(orin, recipe="fp16").execution_provider == "CPUExecutionProvider"


def test_checks_before_any_work(decoder):
    """`check_decoder` refuses what the plan would refuse."""
    with pytest.raises(TargetError, match=r"recipe='fp32'"):
        check_decoder(decoder, ZERO, "fp32", None)
