"""`bench` and `eval` as typed."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
from pathlib import Path

import pytest
from support.tiny_graphs import HEAD_DIM, KV_HEADS, LAYERS

ARC = Path(__file__).parents[3] / ".." / "shared" / "data" / "questions" / "arc_easy.jsonl"
BENCH_KEYS = {
    "load_ms", "cold_first_token_ms", "prefill_tps", "decode_tps", "ttft_ms", "peak_rss_mb", "weight_bytes",
    "streamed_bytes_per_token", "effective_gbps", "machine_gbps", "threads", "allowance", "variant",
    "session_options", "runtime", "cpu", "model", "bundle_id", "prompt_tokens", "new_tokens", "concurrency",
    "repeats", "runs",
}  # fmt: skip
EVAL_KEYS = {
    "n", "accuracy", "stderr", "metric", "acc", "acc_norm", "normalization", "by_metric", "by_source",
    "escalated_share", "usd", "mode", "model", "bundle_id", "data", "seconds",
}  # fmt: skip
DEAD = "http://127.0.0.1:9/v1"


def test_bench_json(run, answering_bundle) -> None:
    """The contract's fields, exact token counts, and figures that fit together."""
    counts = ("--prompt-tokens", 40, "--new-tokens", 8, "--repeat", 3, "--threads", 1)
    ran = run("bench", answering_bundle, *counts, "--json")
    assert ran.status == 0, ran.err
    report = json.loads(ran.out)
    assert set(report) == BENCH_KEYS
    assert (report["threads"], report["repeats"], report["variant"]) == (1, 3, "int4")
    assert all(len(values) == 3 for values in report["runs"].values())
    assert sorted(report["runs"]["decode_tps"])[1] == report["decode_tps"]
    kv = 2 * LAYERS * KV_HEADS * HEAD_DIM * 4 * (40 + 8 / 2)
    assert report["streamed_bytes_per_token"] - kv == int(report["streamed_bytes_per_token"] - kv) > 0
    assert report["effective_gbps"] * 1e9 == pytest.approx(
        report["streamed_bytes_per_token"] * report["decode_tps"]
    )
    assert report["cold_first_token_ms"] > report["load_ms"] > 0 and 10 < report["peak_rss_mb"] < 2000
    assert report["machine_gbps"] > 0.1


def test_bench_refusals(run, answering_bundle) -> None:
    """What cannot be measured is one line and status 2."""
    assert "only 1" in run("bench", answering_bundle, "--concurrency", 4).fails_in_one_line(2)
    assert "1280" in run("bench", answering_bundle, "--new-tokens", 5000).fails_in_one_line(2)
    for option in ("--repeat", "--prompt-tokens", "--new-tokens", "--threads"):
        assert option in run("bench", answering_bundle, option, 0).fails_in_one_line(2)
    run("bench", "nowhere").fails_in_one_line(2)


def test_bench_interrupted(spawn, answering_bundle) -> None:
    """Ctrl-C during a measurement ends it and its fresh process, without a traceback."""
    master, slave = pty.openpty()
    process = spawn("bench", answering_bundle, "--repeat", 1000, "--new-tokens", 500, "--json", stderr=slave)
    os.close(slave)
    shown = b""
    while b"measuring" not in shown:  # a terminal is told what goes on
        shown += os.read(master, 4096)
    process.send_signal(signal.SIGINT)
    out = process.stdout.read()
    with contextlib.suppress(OSError):  # Linux: the other end is closed
        while chunk := os.read(master, 4096):
            shown += chunk
    os.close(master)
    assert (process.wait(timeout=30), out) == (130, "") and b"Traceback" not in shown


def _rows(tmp_path: Path) -> Path:
    rows = [
        {"question": "Which?", "choices": ["one", "two", "three"], "answer": 1},
        {"query": "The sky is", "choices": ["blue", "green"], "gold": 0},
        {"question": "1 + 1?", "answer": "So #### 2"},
        {"question": "Who?", "answer": "Ada"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_eval_json(run, answering_bundle, tmp_path) -> None:
    """Scored and generated rows in one file: the contract's fields, the same figures every time."""
    given = ("eval", answering_bundle, "--data", _rows(tmp_path), "--max-tokens", 4, "--json")
    first, second = (json.loads(run(*given).out) for _ in range(2))
    assert set(first) == EVAL_KEYS and first["n"] == 4 and first["metric"] == "mixed"
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert {name: part["n"] for name, part in first["by_metric"].items()} == {
        "choice": 2,
        "exact": 1,
        "number": 1,
    }
    assert first["by_source"]["local"]["n"] == 4 and first["acc"] is not None and first["usd"] == 0
    limited = json.loads(run(*given, "--limit", 2).out)
    assert (limited["n"], limited["metric"]) == (2, "choice") and limited["accuracy"] == limited["acc_norm"]
    shown = run(*given[:-1])
    assert shown.status == 0 and "per character" in shown.out


def test_eval_with_the_cloud(run, answering_bundle, cloud_url, tmp_path) -> None:
    """Mode cloud asks for letters: all escalated, likelihoods unknown, money by the given price."""
    given = (
        "eval",
        answering_bundle,
        "--data",
        _rows(tmp_path),
        "--max-tokens",
        4,
        "--json",
        "--mode",
        "cloud",
    )
    document = json.loads(run(*given, "--cloud", cloud_url, "--usd-per-mtok-in", 5).out)
    assert (document["escalated_share"], document["acc"]) == (1.0, None) and document["usd"] > 0
    run(*given, "--cloud", DEAD).fails_in_one_line(4)
    run(*given).fails_in_one_line(2)


def test_eval_refusals(run, answering_bundle, tmp_path) -> None:
    """Bad data and options are one line and status 2, with the line's number."""
    rows = _rows(tmp_path)
    (tmp_path / "long.jsonl").write_text(
        json.dumps({"question": "x" * 5000, "choices": ["a", "b"], "answer": 0})
    )
    (tmp_path / "bad.jsonl").write_text('{"question": "q", "choices": ["a", "b"], "answer": 5}\n')
    for data, expected in ((tmp_path / "no", "No such"), (tmp_path / "bad.jsonl", "line 1"),
                           (tmp_path / "long.jsonl", "line 1"), (tmp_path, "directory")):  # fmt: skip
        assert expected in run("eval", answering_bundle, "--data", data).fails_in_one_line(2)
    assert "line 3" in run("eval", answering_bundle, "--data", rows, "--metric", "choice").fails_in_one_line(
        2
    )
    assert "--limit" in run("eval", answering_bundle, "--data", rows, "--limit", 0).fails_in_one_line(2)


def test_eval_public_rows(run, answering_bundle) -> None:
    """ARC-Easy's own file works as it is."""
    if not ARC.exists():
        pytest.skip("../shared/data/questions is not here")
    document = json.loads(run("eval", answering_bundle, "--data", ARC, "--limit", 30, "--json").out)
    assert document["n"] == 30 and 0 <= document["accuracy"] <= 1
