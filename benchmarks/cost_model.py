"""Predicted beside published and measured: how far the cost model can be trusted.

    python benchmarks/cost_model.py [--peers benchmarks/results/peers.json] [--out benchmarks/results]

Prints one table and writes `cost_model.json` and `cost_model.md`. A row marked "fit" helped to choose a
constant of its board's profile, so its error shows how well few constants describe the data, not foresight;
the leave-one-out column refits bandwidth and fixed cost (`fit_roofline`) on the other rows of
the same board and processor and predicts this one. Rows of this machine come from the peers'
benchmark where its results exist, on a profile probed then.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from gguf_sizes import graph_cost

from edge_reasoner.contract.profile.cost import GraphCost, predict
from edge_reasoner.contract.profile.load import load_profile
from edge_reasoner.contract.profile.schema import DeviceProfile, Figure
from edge_reasoner.machine.probe import probe_machine

#: published runs rarely state their context; short ones are the rule
PROMPT_TOKENS, NEW_TOKENS = 64, 128
GPU, NPU = "ampere-gpu", "rknpu2"


@dataclass(frozen=True)
class Row:
    """One published or measured run."""

    machine: str
    processor: str
    model: str
    format: str
    runtime: str
    quantity: str
    published: float
    graph: GraphCost
    profile: DeviceProfile
    #: whether a constant of the profile was chosen with this row in sight
    fitted: bool
    note: str = ""
    prompt_tokens: int = PROMPT_TOKENS
    new_tokens: int = NEW_TOKENS


@dataclass(frozen=True)
class Result:
    """A row with its prediction. Errors in percent of the published value."""

    machine: str
    processor: str
    model: str
    format: str
    runtime: str
    quantity: str
    streamed_mb: float
    published: float
    predicted: float
    error_percent: float
    fitted: bool
    left_out_predicted: float | None
    left_out_error_percent: float | None
    note: str


def published_rows() -> list[Row]:
    """Decode speeds that others published, for boards with a built-in profile."""
    q4, ollama = "Q4_K_M", "Ollama"
    tag = "format by Ollama's default tag"
    guess = "format not stated, taken as Q4_K_M"
    table = [
        ("raspberry-pi-5", "cpu", "Qwen2.5-0.5B", q4, "llama.cpp", 25.8, True, ""),
        ("raspberry-pi-5", "cpu", "Qwen2.5-0.5B", "Q8_0", "llama.cpp", 19.9, True, ""),
        ("raspberry-pi-5", "cpu", "Qwen2.5-0.5B", q4, ollama, 20.4, False, tag),
        ("raspberry-pi-5", "cpu", "Llama-3.2-1B", "Q8_0", ollama, 7.7, False, tag),
        ("raspberry-pi-5", "cpu", "Qwen2.5-1.5B", q4, ollama, 7.5, False, tag),
        ("raspberry-pi-4b", "cpu", "Qwen2.5-0.5B", q4, ollama, 7.9, True, tag),
        ("raspberry-pi-4b", "cpu", "Llama-3.2-1B", "Q8_0", ollama, 2.6, True, tag),
        ("raspberry-pi-4b", "cpu", "Qwen2.5-1.5B", q4, ollama, 3.5, True, tag),
        ("raspberry-pi-4b", "cpu", "SmolLM-135M", "Q2_K", "llama.cpp", 28.8, True, ""),
        ("jetson-orin-nano-super", "cpu", "SmolLM-135M", q4, "llama.cpp", 84.0, True, guess),
        ("jetson-orin-nano-super", GPU, "SmolLM-135M", q4, "llama.cpp", 190.0, False, guess),
        ("jetson-orin-nano-super", GPU, "SmolLM2-135M", q4, "llama.cpp", 165.0, True, "25 W mode"),
        ("jetson-orin-nano-super", GPU, "Llama-3.2-1B", q4, "llama.cpp", 62.0, True, guess),
        ("jetson-orin-nano-super", GPU, "Qwen2.5-0.5B", q4, "not stated", 50.0, False, guess),
        ("rk3588", NPU, "Qwen2-0.5B", "W8", "RKLLM", 41.6, True, ""),
        ("rk3588", NPU, "TinyLlama-1.1B", "W8", "RKLLM", 24.4, True, ""),
        ("jetson-agx-orin", GPU, "Llama-2-7B", "Q4_0", "not stated", 22.5, False, "AGX-class, 4 bits"),
    ]
    return [
        Row(board, on, model, form, runtime, "decode tok/s", speed, graph_cost(model, form),
            load_profile(board), fitted, note)
        for board, on, model, form, runtime, speed, fitted, note in table
    ]  # fmt: skip


def other_rows() -> list[Row]:
    """The published first-token time and energies, and a measured resident set."""
    pi, orin, rock = (load_profile(n) for n in ("raspberry-pi-5", "jetson-orin-nano-super", "rk3588"))
    qwen, smol = graph_cost("Qwen2.5-0.5B", "Q4_K_M"), graph_cost("SmolLM2-135M", "Q4_K_M")
    wide = graph_cost("Qwen2-0.5B", "W8")
    int4 = graph_cost("SmolLM2-135M", "Q4_0", kv_bytes=4, context_tokens=640)
    int4 = msgspec.structs.replace(int4, total_weight_bytes=86_000_000, streamed_weight_bytes=86_000_000)
    return [
        Row(rock.name, NPU, "Qwen2-0.5B", "W8", "RKLLM", "TTFT ms @128", 146.0, wide, rock, True,
            prompt_tokens=128),
        Row(pi.name, "cpu", "Qwen2.5-0.5B", "Q4_K_M", "llama.cpp", "J/token", 0.26, qwen, pi, True),
        Row(orin.name, GPU, "SmolLM2-135M", "Q4_K_M", "llama.cpp", "J/token", 1 / 22.6, smol, orin, True,
            "stress power guessed with this row in sight; the figure covers the module's rails"),
        Row("x86 AVX-512 (reference)", "cpu", "SmolLM2-135M", "int4 block 32", "onnxruntime", "peak RSS MB",
            222.0, int4, reference_machine(), True, prompt_tokens=512),
    ]  # fmt: skip


def reference_machine() -> DeviceProfile:
    """The 2-core AVX-512 machine on which the naive onnxruntime loop was measured (28 GB/s read)."""
    base = load_profile("generic-x86")
    source = "measured once with the rows below"
    cluster = msgspec.structs.replace(base.clusters[0], isa=("avx2", "avx512f", "avx512vnni"))
    memory = msgspec.structs.replace(
        base.memory,
        effective_decode_gbps=Figure(value=0.85 * 28, basis="estimated", source="0.85 of 28 GB/s read"),
    )
    cpu = msgspec.structs.replace(
        base.cpu, float_gmacs=Figure(value=140, basis="measured", source=f"fp32 prefill, {source}")
    )
    return msgspec.structs.replace(base, clusters=(cluster,), memory=memory, cpu=cpu)


def reference_rows() -> list[Row]:
    """SmolLM2-135M in a naive onnxruntime loop: 512-token prompt, 128 new tokens, float32 KV cache."""
    profile = reference_machine()
    measured = [
        ("int4 block 32", 86e6, 160.0, 1140.0, True, True),
        ("int8 block 32", 151.3e6, 99.0, 1023.0, False, False),
        ("fp32", 540e6, 51.0, 1218.0, False, True),
    ]
    rows = []
    for form, size, decode, prefill, decode_fitted, prefill_fitted in measured:
        shape = graph_cost("SmolLM2-135M", "F32" if form == "fp32" else "Q4_0", kv_bytes=4)
        graph = msgspec.structs.replace(shape, total_weight_bytes=int(size), streamed_weight_bytes=int(size))
        for quantity, value, fitted in (
            ("decode tok/s", decode, decode_fitted),
            ("prefill tok/s", prefill, prefill_fitted),
        ):
            rows.append(
                Row("x86 AVX-512 (reference)", "cpu", "SmolLM2-135M", form, "onnxruntime", quantity, value,
                    graph, profile, fitted, prompt_tokens=512)
            )  # fmt: skip
    return rows


def peer_rows(path: Path, profile: DeviceProfile) -> list[Row]:
    """Rows {name, weight_bytes, decode_tps, prefill_tps} of this machine's peers benchmark (SmolLM2-135M)."""
    document = json.loads(path.read_text(encoding="utf-8"))
    entries = document["rows"] if isinstance(document, dict) else document
    rows = []
    for entry in entries:
        wide = "fp32" in entry["name"].lower()
        kv_bytes = 4 if "llama" not in entry["name"].lower() else 2
        shape = graph_cost("SmolLM2-135M", "F32" if wide else "Q4_0", kv_bytes=kv_bytes)
        size = int(entry["weight_bytes"])
        graph = msgspec.structs.replace(shape, total_weight_bytes=size, streamed_weight_bytes=size)
        for key, quantity in (("decode_tps", "decode tok/s"), ("prefill_tps", "prefill tok/s")):
            if entry.get(key):
                rows.append(
                    Row("this machine", "cpu", "SmolLM2-135M", entry["name"], entry["name"].split()[0],
                        quantity, float(entry[key]), graph, profile, False, prompt_tokens=512)
                )  # fmt: skip
    return rows


def evaluate(rows: list[Row]) -> list[Result]:
    """Predicts every row, and again without it where its processor has three decode rows or more."""
    return [_result(row, rows) for row in rows]


def _result(row: Row, rows: list[Row]) -> Result:
    prediction = predict(
        row.graph,
        row.profile,
        prompt_tokens=row.prompt_tokens,
        new_tokens=row.new_tokens,
        processor=row.processor,
    )
    predicted = {
        "decode tok/s": prediction.decode_tps,
        "prefill tok/s": prediction.prefill_tps,
        "TTFT ms @128": prediction.ttft_ms,
        "J/token": prediction.joules_per_token or 0.0,
        "peak RSS MB": prediction.peak_rss_mb,
    }[row.quantity]
    left_out = _leave_one_out(row, rows)
    return Result(
        row.machine, row.processor, row.model, row.format, row.runtime, row.quantity,
        row.graph.streamed_weight_bytes / 1e6, row.published, predicted, _error(predicted, row.published),
        row.fitted, left_out, None if left_out is None else _error(left_out, row.published), row.note,
    )  # fmt: skip


def _step_bytes(row: Row) -> float:
    """Bytes of one decode step: weights and the KV cache of the mean context."""
    context = row.prompt_tokens + row.new_tokens / 2
    return row.graph.streamed_weight_bytes + row.graph.kv_bytes_per_token * context


def _leave_one_out(row: Row, rows: list[Row]) -> float | None:
    others = [
        (_step_bytes(other), other.published)
        for other in rows
        if other is not row
        and (other.machine, other.processor, other.quantity) == (row.machine, row.processor, "decode tok/s")
    ]
    if row.quantity != "decode tok/s" or len(others) < 2:
        return None
    try:
        gbps, fixed_ms = fit_roofline(others)
    except ValueError:
        return None  # the other rows contradict a roofline: more bytes were faster
    return 1e3 / (_step_bytes(row) / gbps / 1e6 + fixed_ms)


def fit_roofline(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least-squares fit of measured decode speeds: (effective GB/s, fixed ms) from (bytes, tok/s) pairs.

    Minimizes the relative error of 1/tok/s; the fixed part is held at 0 or above, and at 0 for one point.
    Raises ValueError without points or where more bytes never cost more time.
    """
    if not points or any(size <= 0 or speed <= 0 for size, speed in points):
        raise ValueError("points: at least one pair of positive bytes and tok/s is needed")
    rows = [(size / 1e6, 1e3 / speed) for size, speed in points]  # MB, ms
    weight = sum(1 / y**2 for _, y in rows)
    sx, sxx = sum(x / y**2 for x, y in rows), sum(x * x / y**2 for x, y in rows)
    sy, sxy = sum(1 / y for _, y in rows), sum(x / y for x, y in rows)
    determinant = weight * sxx - sx * sx
    fixed, slope = 0.0, sxy / sxx
    if len({x for x, _ in rows}) > 1 and determinant > 0:
        fitted = (sy * sxx - sx * sxy) / determinant
        if fitted > 0:
            fixed, slope = fitted, (weight * sxy - sx * sy) / determinant
    if slope <= 0:
        raise ValueError("points: more bytes do not cost more time; no bandwidth fits them")
    return 1.0 / slope, fixed  # MB per ms = GB per s


def _error(predicted: float, published: float) -> float:
    return (predicted / published - 1) * 100


def summary(results: list[Result]) -> dict[str, Any]:
    """Medians of the absolute errors, in percent."""

    def median(values: list[float]) -> float | None:
        return round(statistics.median(map(abs, values)), 1) if values else None

    return {
        "rows": len(results),
        "median_abs_error_percent": median([r.error_percent for r in results]),
        "median_abs_error_percent_rows_not_fitted": median(
            [r.error_percent for r in results if not r.fitted]
        ),
        "rows_not_fitted": sum(not r.fitted for r in results),
        "median_abs_error_percent_leave_one_out": median(
            [r.left_out_error_percent for r in results if r.left_out_error_percent is not None]
        ),
        "rows_left_out": sum(r.left_out_error_percent is not None for r in results),
        "worst_abs_error_percent": round(max(abs(r.error_percent) for r in results), 1),
    }


def markdown(results: list[Result], figures: dict[str, Any]) -> str:
    """The table as GitHub Markdown."""
    columns = "machine on model format runtime quantity MB/token published predicted error fit left-out"
    lines = ["| " + " | ".join(columns.split()) + " |", "|---|---|---|---|---|---|---|---|---|---|---|---|"]
    for r in results:
        left = "–" if r.left_out_error_percent is None else f"{r.left_out_error_percent:+.0f} %"
        lines.append(
            f"| {r.machine} | {r.processor} | {r.model} | {r.format} | {r.runtime} | {r.quantity} "
            f"| {r.streamed_mb:.0f} | {r.published:.4g} | {r.predicted:.4g} | {r.error_percent:+.0f} % "
            f"| {'yes' if r.fitted else 'no'} | {left} |"
        )
    notes = sorted({f"{r.machine} {r.model} {r.runtime}: {r.note}" for r in results if r.note})
    lines += ["", *(f"- {key.replace('_', ' ')}: {value}" for key, value in figures.items())]
    lines += ["", "Assumptions:", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def write_atomically(path: Path, text: str) -> None:
    """Writes through a temporary file beside `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as stream:
        stream.write(text)
    Path(stream.name).chmod(0o644)
    Path(stream.name).replace(path)


def main() -> None:
    """Command line."""
    here = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers", type=Path, default=here / "peers.json", help="results of this machine")
    parser.add_argument("--out", type=Path, default=here, help="folder for cost_model.json and cost_model.md")
    options = parser.parse_args()
    rows = published_rows() + reference_rows() + other_rows()
    if options.peers.exists():
        rows += peer_rows(options.peers, probe_machine(progress=print))
    else:
        print(f"{options.peers} is absent: no rows of this machine; run benchmarks/peers.py first")
    results = evaluate(rows)
    figures = summary(results)
    table = markdown(results, figures)
    print(table)
    document = {"summary": figures, "rows": [asdict(result) for result in results]}
    write_atomically(options.out / "cost_model.json", json.dumps(document, indent=1) + "\n")
    write_atomically(options.out / "cost_model.md", table)


if __name__ == "__main__":
    main()
