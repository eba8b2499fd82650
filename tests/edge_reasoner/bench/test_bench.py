"""What `bench` measures and how: exact token counts, streamed bytes, a fresh process."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from support import tiny_graphs as tiny
from support.answering_bundle import write_answering_bundle

from edge_reasoner.bench.bench import BenchOptions, bench, peak_rss_bytes, random_prompt
from edge_reasoner.contract.bundle.graph_bytes import graph_bytes
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.errors import BackendError, InputError
from edge_reasoner.query.assemble import Machine


def test_streamed_bytes_against_onnx(tmp_path: Path) -> None:
    """The bytes a step reads are all initializers but embedding and rotary tables, as onnx counts."""
    bundle = open_bundle(write_answering_bundle(tmp_path / "bundle"))
    model = onnx.load(tmp_path / "bundle/graphs/fp32.onnx")
    sizes = {t.name: onnx.numpy_helper.to_array(t).nbytes for t in model.graph.initializer}
    found = graph_bytes(bundle, "graphs/fp32.onnx")
    by_rows = ("embed", "cos", "sin", "final")  # all inputs of operators that read single rows
    assert found.streamed == sum(sizes.values()) - sum(sizes[name] for name in by_rows)
    files = [tmp_path / "bundle/graphs" / name for name in ("fp32.onnx", "fp32.onnx.data")]
    assert found.stored == sum(file.stat().st_size for file in files)


def test_tied_embedding_is_streamed(tmp_path: Path) -> None:
    """A table that a matrix product reads too counts whole."""
    model = tiny.decoder_model(tiny.weights(), 0)
    model.graph.node.append(
        onnx.helper.make_node("FusedMatMul", ["x", "embed"], ["unused"], domain=tiny.MS, transB=1)
    )
    root = write_answering_bundle(tmp_path / "bundle")
    before = graph_bytes(open_bundle(root), "graphs/fp32.onnx").streamed
    from support import tiny_bundle

    tiny.save(model, root / "graphs/fp32.onnx")
    for name in ("graphs/fp32.onnx", "graphs/fp32.onnx.data"):
        tiny_bundle.relist(root, name)
    assert (
        graph_bytes(open_bundle(root), "graphs/fp32.onnx").streamed - before == tiny.VOCAB * tiny.HIDDEN * 4
    )


def test_prompts_are_exact_and_repeatable() -> None:
    """Ids stay inside the vocabulary; the same seed gives the same prompt, another seed another."""
    ids = random_prompt(7, 500, (1, 2))
    assert len(ids) == 500 and set(ids) == set(range(7))
    assert ids == random_prompt(7, 500, (1, 2)) != random_prompt(7, 500, (1, 3))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"concurrency": 2}, "only 1"),
        ({"repeats": 0}, "repeats=0 "),
        ({"prompt_tokens": 0}, "prompt_tokens=0 "),
        ({"new_tokens": -1}, "new_tokens=-1 "),
    ],
)
def test_senseless_options(options: dict, expected: str) -> None:
    """Refused in one line that names the parameter."""
    with pytest.raises(InputError, match=expected):
        BenchOptions(**options)


def test_fresh_process_that_fails(tmp_path: Path) -> None:
    """A fresh process that dies is one line with its last words, not a hang."""
    bundle = open_bundle(write_answering_bundle(tmp_path / "bundle"))
    words = "import sys; sys.exit('no such luck')"
    with pytest.raises(BackendError, match="no such luck"):
        bench(
            bundle,
            Machine(threads=1, cache_dir=tmp_path / "cache"),
            BenchOptions(8, 2, 1),
            machine_gbps=lambda: 1.0,
            advance=lambda what: None,
            python=("sh", "-c", f'exec python3 -c "{words}"'),
        )


def test_peak_memory(tmp_path: Path) -> None:
    """From VmHWM where the system tells, else from getrusage: both in bytes."""
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t   2048 kB\n")
    assert peak_rss_bytes(tmp_path / "status") == 2048 * 1024
    assert 1e6 < peak_rss_bytes(tmp_path / "none") < 1e12


def test_a_prompt_longer_than_an_argument_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fresh process gets a prompt of 34,000 tokens whole: Linux takes 128 KiB in an argument."""
    monkeypatch.setattr(tiny, "CONTEXT", 1 << 16)
    bundle = open_bundle(write_answering_bundle(tmp_path / "bundle"))
    words = "import json, sys; sys.exit(str(len(json.loads(sys.stdin.readline())['prompt_ids'])) + ' came')"
    with pytest.raises(BackendError, match="34000 came"):
        bench(
            bundle,
            Machine(threads=1, cache_dir=tmp_path / "cache"),
            BenchOptions(34_000, 2, 1),
            machine_gbps=lambda: 1.0,
            advance=lambda what: None,
            python=("sh", "-c", f'exec python3 -c "{words}"'),
        )


def test_a_fresh_process_that_says_much(tmp_path: Path) -> None:
    """More on standard error than a pipe holds, not all of it UTF-8, before the first line: no waiting, and
    the last line is what is told."""
    bundle = open_bundle(write_answering_bundle(tmp_path / "bundle"))
    words = "import os,sys; os.write(2, b'x\\xff' * 500000 + b'\\nat last \\xff\\n'); sys.exit(3)"
    with pytest.raises(BackendError, match="at last"):
        bench(
            bundle,
            Machine(threads=1, cache_dir=None),
            BenchOptions(prompt_tokens=4, new_tokens=2, repeats=1),
            machine_gbps=lambda: 1.0,
            advance=lambda what: None,
            python=("sh", "-c", f'exec python3 -c "{words}"'),
        )
