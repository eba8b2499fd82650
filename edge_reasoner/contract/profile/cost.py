"""The cost model: what a graph will cost on a board, before either is at hand.

    t_token   = (streamed weight bytes + KV bytes of the mean context) / effective bandwidth + fixed step cost
    t_prefill = max(multiply-accumulates / reachable rate, streamed bytes / effective bandwidth) + fixed cost
    RSS       = weights × prepack ratio + KV cache + activations + runtime base
    J/token   = watts while decoding × t_token

Pure functions of a `GraphCost` (the exporter fills it from its plan) and a `DeviceProfile`. Everything
returned is an estimate; `benchmarks/cost_model.py` prints it beside published and measured figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta

from edge_reasoner.contract.profile.schema import Basis, Cluster, DeviceProfile, Figure, Record
from edge_reasoner.errors import ProfileError, TargetError

Arithmetic = Literal["int8", "float32", "float16"]
Count = Annotated[int, Meta(ge=0, le=1 << 53)]

#: int8 multiply-accumulates per cycle and core (dot products with 32-bit sums), best feature first
_INT8_MACS_PER_CYCLE = (
    ("amx_int8", 512), ("avx512vnni", 64), ("avx_vnni", 64), ("avx2", 32),
    ("i8mm", 64), ("asimddp", 32), ("asimd", 8),
)  # fmt: skip
_FP32_MACS_PER_CYCLE = (("avx512f", 16), ("avx2", 16), ("asimd", 8))
_FP16_MACS_PER_CYCLE = (("asimdhp", 16), *_FP32_MACS_PER_CYCLE)
#: Share of the float32 peak that matrix products reach where no rate was measured: an assumption, below what
#: HPL reaches in float64 on a Pi 5 (0.48 of its peak; geerlingguy/top500-benchmark).
FLOAT_EFFICIENCY_RATIO = 0.4
#: int8 prefill's share of its own peak over float32's share of its: fitted on one machine (AVX-512-VNNI;
#: SmolLM2-135M prefill at 1,140 tok/s in int8 arithmetic, 1,218 in float32; peaks 4 : 1).
INT8_OVER_FLOAT_RATIO = 0.235
#: Where between idle and stress power a board sits while decoding: it waits for memory. Fitted on one row
#: (Pi 5, Qwen2.5-0.5B Q4_K_M: 6.37 W between 2.8 and 9.7 W).
DECODE_POWER_SHARE = 0.52
#: Resident bytes per weight byte under onnxruntime's prepacking; fitted on one row (SmolLM2-135M int4: 222 MB
#: peak with 86 MB of weights, 29 MB of cache and a base of 90 MiB).
DEFAULT_PREPACK_RATIO = 1.15
_MIB = 1024 * 1024


class GraphCost(Record, frozen=True, kw_only=True):
    """What one graph asks of any machine.

    A decoder's linear work excludes the head (it runs for the last position only at prefill); embedding rows
    are gathered, so an untied input embedding is in `total_weight_bytes` but not in `streamed_weight_bytes`.
    """

    #: bytes of all weights with scales and zero points, as stored
    total_weight_bytes: Count
    #: weight bytes read for one decoded token (head included, gathered embedding rows excluded)
    streamed_weight_bytes: Count
    #: multiply-accumulates per token of all projections except the head
    linear_macs_per_token: Count
    #: multiply-accumulates of the head for one position: hidden × vocabulary (0 for encoders)
    head_macs: Count = 0
    #: multiply-accumulates per (query, key) pair, all layers: Σ 2 × query heads × head dimension
    attention_macs_per_pair: Count = 0
    #: bytes one token adds to the KV cache, all layers
    kv_bytes_per_token: Count = 0
    #: positions the KV cache is allocated for
    context_tokens: Count = 0
    #: peak bytes of activations per token of the largest chunk run at once
    activation_bytes_per_token: Count = 0
    #: what the projections are multiplied in
    arithmetic: Arithmetic = "int8"
    #: resident bytes per stored weight byte once loaded (1.0: memory-mapped as stored)
    prepack_ratio: Annotated[float, Meta(ge=1.0, le=8.0)] = DEFAULT_PREPACK_RATIO


class Prediction(Record, frozen=True, kw_only=True):
    """Predicted cost of a decoder. MB are 10⁶ bytes. `joules_per_token` covers the whole board while decoding
    and is None where the profile has no power figures."""

    size_bytes: int
    peak_rss_mb: float
    prefill_tps: float
    decode_tps: float
    ttft_ms: float
    joules_per_token: float | None
    processor: str
    basis: Basis
    notes: tuple[str, ...]


class EncoderPrediction(Record, frozen=True, kw_only=True):
    """Predicted cost of one run of an encoder over `tokens` tokens."""

    size_bytes: int
    peak_rss_mb: float
    latency_ms: float
    tokens_per_s: float
    joules_per_input: float | None
    processor: str
    basis: Basis
    notes: tuple[str, ...]


class Roofline(Record, frozen=True, kw_only=True):
    """The three numbers that decide speed on one processor, and how far to trust them."""

    processor: str
    effective_gbps: float
    fixed_step_ms: float
    #: reachable multiply-accumulates per second, 10⁹, for the projections and for attention (float32)
    linear_gmacs: float
    attention_gmacs: float
    basis: Basis


def roofline(profile: DeviceProfile, arithmetic: Arithmetic = "int8", processor: str = "cpu") -> Roofline:
    """The roofline of `cpu` or of a named accelerator.

    Raises ProfileError for an unknown processor, TargetError where it cannot run decoders or has no figures.
    """
    if processor == "cpu":
        return _cpu_roofline(profile, arithmetic)
    accelerator = profile.accelerator(processor)
    if accelerator is None:
        allowed = ", ".join(["cpu", *(a.name for a in profile.accelerators)])
        raise ProfileError(f"profile {profile.name!r}: no processor {processor!r}; allowed: {allowed}")
    figures = (accelerator.effective_decode_gbps, accelerator.fixed_step_ms, accelerator.prefill_gmacs)
    bandwidth, fixed, compute = figures
    if bandwidth is None or fixed is None or compute is None or bandwidth.value <= 0 or compute.value <= 0:
        raise TargetError(f"profile {profile.name!r}: no speed figures for {processor!r}; predict on: cpu")
    return Roofline(
        processor=processor,
        effective_gbps=bandwidth.value,
        fixed_step_ms=fixed.value,
        linear_gmacs=compute.value,
        attention_gmacs=compute.value / 2,
        basis=_weakest(bandwidth, fixed, compute),
    )


def predict(
    graph: GraphCost,
    profile: DeviceProfile,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    processor: str = "cpu",
) -> Prediction:
    """Cost of a prompt of `prompt_tokens` and then `new_tokens` decoded one by one.

    Raises ValueError unless both counts are at least 1; ProfileError and TargetError as `roofline`.
    """
    if prompt_tokens < 1 or new_tokens < 1:
        raise ValueError("prompt_tokens and new_tokens must be at least 1")
    line = roofline(profile, graph.arithmetic, processor)
    mean_context = prompt_tokens + new_tokens / 2
    bytes_ms = (graph.streamed_weight_bytes + graph.kv_bytes_per_token * mean_context) / (
        line.effective_gbps * 1e6
    )
    token_ms = bytes_ms + line.fixed_step_ms
    prefill_ms = _pass_ms(graph, line, prompt_tokens, causal=True)
    watts = decode_watts(profile)
    rss = peak_rss_bytes(graph, profile, chunk_tokens=prompt_tokens)
    return Prediction(
        size_bytes=graph.total_weight_bytes,
        peak_rss_mb=rss / 1e6,
        prefill_tps=prompt_tokens / prefill_ms * 1e3,
        decode_tps=1e3 / token_ms,
        ttft_ms=prefill_ms,
        joules_per_token=None if watts is None else watts * token_ms / 1e3,
        processor=processor,
        basis="estimated",
        notes=_notes(line, profile, bytes_ms / token_ms, watts),
    )


def predict_encoder(
    graph: GraphCost, profile: DeviceProfile, *, tokens: int = 128, processor: str = "cpu"
) -> EncoderPrediction:
    """Cost of one encoder run over `tokens` tokens. Raises as `predict`."""
    if tokens < 1:
        raise ValueError("tokens must be at least 1")
    line = roofline(profile, graph.arithmetic, processor)
    latency_ms = _pass_ms(graph, line, tokens, causal=False)
    bytes_ms = graph.streamed_weight_bytes / (line.effective_gbps * 1e6)
    stress = profile.power.stress_w
    return EncoderPrediction(
        size_bytes=graph.total_weight_bytes,
        peak_rss_mb=peak_rss_bytes(graph, profile, chunk_tokens=tokens) / 1e6,
        latency_ms=latency_ms,
        tokens_per_s=tokens / latency_ms * 1e3,
        joules_per_input=None if stress is None else stress.value * latency_ms / 1e3,
        processor=processor,
        basis="estimated",
        notes=_notes(line, profile, min(1.0, bytes_ms / latency_ms), None),
    )


def peak_rss_bytes(graph: GraphCost, profile: DeviceProfile, *, chunk_tokens: int = 512) -> int:
    """Peak resident bytes of a process that runs the graph, its KV cache fully allocated."""
    weights = graph.total_weight_bytes * graph.prepack_ratio
    cache = graph.kv_bytes_per_token * graph.context_tokens
    activations = graph.activation_bytes_per_token * chunk_tokens
    return int(weights + cache + activations + profile.cpu.runtime_base_mib.value * _MIB)


def require_fit(graph: GraphCost, profile: DeviceProfile, *, chunk_tokens: int = 512) -> None:
    """Raises TargetError (what, how much, what would help) where the graph exceeds the board's memory."""
    needed = peak_rss_bytes(graph, profile, chunk_tokens=chunk_tokens)
    budget = profile.memory_budget_bytes
    if needed > budget:
        spare = needed - budget
        larger = [size for size in sorted(profile.memory.options_gib) if _added_bytes(profile, size) >= spare]
        hint = f", or the board with {larger[0]:g} GiB" if larger else ""
        raise TargetError(
            f"too large for {profile.name!r}: about {needed / 1e6:.0f} MB at run time, {budget / 1e6:.0f} MB "
            f"are free for a model ({graph.total_weight_bytes / 1e6:.0f} MB of weights, context "
            f"{graph.context_tokens} tokens); try fewer bits, a shorter context or a smaller model{hint}"
        )


def _added_bytes(profile: DeviceProfile, size_gib: float) -> float:
    """How much more memory the board has where it is sold with that size."""
    return (size_gib - profile.memory.capacity_gib.value) * 1024 * _MIB


def decode_watts(profile: DeviceProfile) -> float | None:
    """Watts of the whole board while decoding: between idle and stress, within the default mode's limit."""
    idle, stress = profile.power.idle_w, profile.power.stress_w
    if idle is None or stress is None:
        return None
    watts = idle.value + DECODE_POWER_SHARE * max(0.0, stress.value - idle.value)
    mode = next((m for m in profile.power.modes if m.name == profile.power.default_mode), None)
    limit = mode.limit_w.value if mode is not None and mode.limit_w is not None else watts
    return min(watts, limit)


def _cpu_roofline(profile: DeviceProfile, arithmetic: Arithmetic) -> Roofline:
    table = {
        "int8": _INT8_MACS_PER_CYCLE,
        "float32": _FP32_MACS_PER_CYCLE,
        "float16": _FP16_MACS_PER_CYCLE,
    }[arithmetic]
    clusters = [c for c in profile.clusters if c.big] or list(profile.clusters)
    cpu = profile.cpu
    peak, float_peak = _peak_gmacs(clusters, table), _peak_gmacs(clusters, _FP32_MACS_PER_CYCLE)
    figures = [profile.memory.effective_decode_gbps, cpu.fixed_step_ms]
    if cpu.float_gmacs is not None and cpu.float_gmacs.value > 0:
        attention = cpu.float_gmacs.value
        linear = attention * peak / float_peak * (INT8_OVER_FLOAT_RATIO if arithmetic == "int8" else 1.0)
        figures.append(cpu.float_gmacs)
    else:
        attention = FLOAT_EFFICIENCY_RATIO * float_peak
        share = cpu.prefill_efficiency_ratio.value if arithmetic == "int8" else FLOAT_EFFICIENCY_RATIO
        linear = share * peak
        figures += [cpu.prefill_efficiency_ratio, *(c.clock_ghz for c in clusters)]
    return Roofline(
        processor="cpu",
        effective_gbps=profile.memory.effective_decode_gbps.value,
        fixed_step_ms=cpu.fixed_step_ms.value,
        linear_gmacs=linear,
        attention_gmacs=attention,
        basis=_weakest(*figures),
    )


def _peak_gmacs(clusters: Sequence[Cluster], table: tuple[tuple[str, int], ...]) -> float:
    """Peak 10⁹ multiply-accumulates per second; a core without any listed feature counts 4 per cycle."""
    total = 0.0
    for cluster in clusters:
        per_cycle = next((macs for feature, macs in table if feature in cluster.isa), 4)
        total += cluster.cores * cluster.clock_ghz.value * per_cycle
    return total


def _pass_ms(graph: GraphCost, line: Roofline, tokens: int, *, causal: bool) -> float:
    """One pass over `tokens` tokens: compute, or bandwidth where that takes longer, and the fixed cost."""
    pairs = tokens * (tokens + 1) / 2 if causal else float(tokens * tokens)
    linear = graph.linear_macs_per_token * tokens + graph.head_macs
    compute_ms = linear / (line.linear_gmacs * 1e6)
    compute_ms += graph.attention_macs_per_pair * pairs / (line.attention_gmacs * 1e6)
    bytes_ms = graph.streamed_weight_bytes / (line.effective_gbps * 1e6)
    return max(compute_ms, bytes_ms, 1e-6) + line.fixed_step_ms


def _weakest(*figures: Figure) -> Basis:
    order: tuple[Basis, ...] = ("estimated", "datasheet", "measured")
    return min((f.basis for f in figures), key=order.index)


def _notes(line: Roofline, profile: DeviceProfile, byte_share: float, watts: float | None) -> tuple[str, ...]:
    notes = [
        f"{line.processor}: {line.effective_gbps:g} GB/s effective, {line.fixed_step_ms:g} ms per step "
        f"({line.basis} figures)",
        f"moving bytes takes {byte_share:.0%} of a step",
    ]
    if watts is not None:
        notes.append(f"whole board at about {watts:.1f} W in mode {profile.power.default_mode!r}")
    return tuple(notes)
