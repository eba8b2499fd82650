"""The cost model: monotone, honest about limits, and near published figures."""

import importlib.util
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_reasoner.contract.profile.cost import (
    GraphCost,
    peak_rss_bytes,
    predict,
    predict_encoder,
    require_fit,
    roofline,
)
from edge_reasoner.contract.profile.load import list_profiles, load_profile
from edge_reasoner.errors import ProfileError, TargetError

BENCHMARKS = Path(__file__).parents[4] / "benchmarks"
SMOL = GraphCost(
    total_weight_bytes=86_000_000,
    streamed_weight_bytes=86_000_000,
    linear_macs_per_token=106_200_000,
    head_macs=28_300_000,
    attention_macs_per_pair=34_560,
    kv_bytes_per_token=46_080,
    context_tokens=2048,
)


def load_benchmark(name):
    """A benchmark script as a module (benchmarks/ is no package)."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", list_profiles())
def test_every_board_predicts(name):
    """Every profile yields finite, positive figures on its CPU, and energy where it has power figures."""
    profile = load_profile(name)
    got = predict(SMOL, profile)
    for value in (got.decode_tps, got.prefill_tps, got.ttft_ms, got.peak_rss_mb):
        assert 0 < value < 1e9
    assert (got.joules_per_token is None) == (profile.power.stress_w is None)
    assert got.basis == "estimated" and got.size_bytes == SMOL.total_weight_bytes


@settings(max_examples=80, deadline=None)
@given(
    size=st.integers(1, 10**10),
    more=st.integers(1, 10**10),
    prompt=st.integers(1, 4000),
    name=st.sampled_from(list_profiles()),
)
def test_more_bytes_and_longer_prompts_never_get_cheaper(size, more, prompt, name):
    """More weight bytes never decode faster or need less memory; a longer prompt never answers sooner."""
    profile = load_profile(name)
    small = msgspec.structs.replace(SMOL, total_weight_bytes=size, streamed_weight_bytes=size)
    large = msgspec.structs.replace(SMOL, total_weight_bytes=size + more, streamed_weight_bytes=size + more)
    one, two = (predict(g, profile, prompt_tokens=prompt) for g in (small, large))
    assert two.decode_tps < one.decode_tps
    assert two.peak_rss_mb >= one.peak_rss_mb
    longer = predict(small, profile, prompt_tokens=prompt + 1)
    assert longer.ttft_ms >= one.ttft_ms and longer.decode_tps <= one.decode_tps


def test_faster_memory_decodes_faster():
    """The same graph decodes in the order of the boards' effective bandwidths."""
    names = ("raspberry-pi-zero-2w", "raspberry-pi-4b", "raspberry-pi-5", "rk3588")
    speeds = [predict(SMOL, load_profile(n)).decode_tps for n in names]
    assert speeds == sorted(speeds)


def test_roofline_follows_its_formula():
    """Decode is bytes over bandwidth plus the fixed step, exactly."""
    profile = load_profile("raspberry-pi-5")
    line = roofline(profile)
    got = predict(SMOL, profile, prompt_tokens=100, new_tokens=56)
    expected_ms = (86e6 + 46_080 * 128) / (line.effective_gbps * 1e6) + line.fixed_step_ms
    assert 1e3 / got.decode_tps == pytest.approx(expected_ms)
    assert peak_rss_bytes(SMOL, profile) == int(86e6 * SMOL.prepack_ratio + 46_080 * 2048 + 90 * 2**20)


def test_encoder_latency_grows_with_tokens_and_floors_at_bandwidth():
    """An encoder takes longer for more tokens, and never less than reading its weights once."""
    profile = load_profile("raspberry-pi-4b")
    graph = GraphCost(
        total_weight_bytes=24_000_000,
        streamed_weight_bytes=11_000_000,
        linear_macs_per_token=10_600_000,
        attention_macs_per_pair=2 * 6 * 384,
    )
    latencies = [predict_encoder(graph, profile, tokens=n).latency_ms for n in (1, 16, 128, 256)]
    assert latencies == sorted(latencies)
    assert latencies[0] >= 11e6 / 3.5e6


def test_processors_and_arguments_are_checked():
    """Unknown processors, accelerators without figures and empty prompts are refused by name."""
    with pytest.raises(ProfileError, match="allowed: cpu, rknpu2"):
        predict(SMOL, load_profile("rk3588"), processor="gpu")
    with pytest.raises(TargetError, match="predict on: cpu"):
        predict(SMOL, load_profile("coral"), processor="edge-tpu")
    with pytest.raises(ValueError, match="at least 1"):
        predict(SMOL, load_profile("coral"), prompt_tokens=0)


def test_too_large_models_are_refused():
    """A model beyond the board's memory is refused with both sizes; one that fits passes."""
    profile = load_profile("raspberry-pi-zero-2w")
    large = msgspec.structs.replace(SMOL, total_weight_bytes=900_000_000)
    with pytest.raises(TargetError, match="900 MB of weights"):
        require_fit(large, profile)
    require_fit(SMOL, profile)


def test_a_larger_board_is_named_where_it_would_do():
    """The smallest size sold that holds the model; none where even the largest is short."""
    board = load_profile("raspberry-pi-4b")
    for weight_gib, words in ((5, "or the board with 8 GiB$"), (60, "or a smaller model$")):
        graph = msgspec.structs.replace(SMOL, total_weight_bytes=weight_gib << 30, prepack_ratio=1.0)
        with pytest.raises(TargetError, match=words):
            require_fit(graph, board)


@settings(max_examples=60, deadline=None)
@given(gbps=st.floats(0.5, 300), fixed=st.floats(0.01, 20), sizes=st.sets(st.integers(1, 40), min_size=2))
def test_fit_recovers_an_exact_roofline(gbps, fixed, sizes):
    """Speeds made from a bandwidth and a fixed cost are fitted back to them."""
    points = [(s * 1e8, 1e3 / (s * 1e8 / (gbps * 1e6) + fixed)) for s in sizes]
    got_gbps, got_fixed = load_benchmark("cost_model").fit_roofline(points)
    assert got_gbps == pytest.approx(gbps, rel=1e-3)
    assert got_fixed == pytest.approx(fixed, rel=1e-2, abs=1e-2)


def test_fit_refuses_nonsense():
    """No points, or more bytes in less time, give no bandwidth."""
    fit_roofline = load_benchmark("cost_model").fit_roofline
    with pytest.raises(ValueError, match="at least one"):
        fit_roofline([])
    with pytest.raises(ValueError, match="more bytes"):
        fit_roofline([(1e8, 1.0), (2e8, 1000.0)])


#: bytes of files on the Hugging Face hub and in Ollama's library, 10⁶
PUBLISHED_MB = [
    ("Qwen2.5-0.5B", "Q4_K_M", 397.8), ("Qwen2.5-0.5B", "Q8_0", 531), ("Qwen2.5-1.5B", "Q4_K_M", 986),
    ("Llama-3.2-1B", "Q8_0", 1321), ("Llama-3.2-1B", "Q4_K_M", 807.7), ("SmolLM-135M", "Q2_K", 88.2),
    ("TinyLlama-1.1B", "Q4_K_M", 668), ("Llama-2-7B", "Q4_K_M", 4081), ("Llama-2-7B", "Q4_0", 3826),
]  # fmt: skip


@pytest.mark.parametrize(("model", "form", "file_mb"), PUBLISHED_MB)
def test_computed_gguf_sizes_match_published_files(model, form, file_mb):
    """Sizes computed from shape and format are within 3 % of the published files (which add a vocabulary)."""
    sizes = load_benchmark("gguf_sizes")
    total, streamed = sizes.weight_bytes(sizes.SHAPES[model], form)
    assert total / 1e6 == pytest.approx(file_mb, rel=0.03)
    assert streamed <= total


def test_predictions_near_published_figures():
    """At least ten published or measured rows: median error within 10 %, and within 30 % where nothing was
    fitted; the table says which rows were."""
    bench = load_benchmark("cost_model")
    results = bench.evaluate(bench.published_rows() + bench.reference_rows() + bench.other_rows())
    figures = bench.summary(results)
    assert figures["rows"] >= 10 and figures["rows_not_fitted"] >= 8
    assert figures["median_abs_error_percent"] <= 10
    assert figures["median_abs_error_percent_rows_not_fitted"] <= 30
    assert figures["median_abs_error_percent_leave_one_out"] <= 30
    assert bench.markdown(results, figures).count("\n| ") >= 10


def test_peers_rows_are_read(tmp_path):
    """The peers benchmark's result file yields decode and prefill rows of this machine."""
    bench = load_benchmark("cost_model")
    path = tmp_path / "peers.json"
    path.write_text(
        '{"rows": [{"name": "ours int4", "weight_bytes": 8.6e7, "decode_tps": 150, "prefill_tps": 9}]}'
    )
    rows = bench.peer_rows(path, load_profile("generic-x86"))
    assert [r.quantity for r in rows] == ["decode tok/s", "prefill tok/s"]
    assert len(bench.evaluate(rows)) == 2
