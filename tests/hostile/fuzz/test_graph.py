"""Fuzzer of graphs: read and checked as a bundle's are, bytes and values damaged; what passes is run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hostile.fuzz.mutate import FEW, MANY, check
from support.graph_mutations import graph_mutations
from support.graph_runtimes import pythons, runtime_agrees
from support.hostile_graphs import Sound

from edge_reasoner.contract.bundle.graph_check import check_graph
from edge_reasoner.contract.bundle.onnx_scan import Known


def graph_fuzzer(
    sound: Mapping[str, Sound], passed: Callable[[str, bytes], object] = lambda base, data: None
) -> Callable[[bytes], None]:
    """`fuzz_graph` against the specs and files of these graphs; `passed` gets what the check lets pass."""
    files = {name: graph.files for name, graph in sound.items()}

    def fuzz_graph(data: bytes) -> None:
        """What passes names files of the bundle and nothing else, and is read alike a second time."""
        base = "encoder" if b"attention_mask" in data else "packed" if b"MatMulNBits" in data else "normed"
        known: Known = {}
        found = check_graph(data, "g.onnx", sound[base].spec, files[base], known)
        assert set(found) <= files[base].keys()
        assert check_graph(memoryview(data), "g.onnx", sound[base].spec, files[base], known) == found
        passed(base, data)

    return fuzz_graph


def fuzz(sound: Mapping[str, Sound], count: int, seed: int, folder: Path) -> None:
    """The seeds and `count` mutations of them; then every runtime runs those that pass."""
    accepted: list[str] = []

    def keep(base: str, data: bytes) -> None:
        path = folder / base / f"{len(accepted)}.onnx"
        path.write_bytes(data)
        accepted.append(str(path))

    for name, graph in sound.items():
        (folder / name).mkdir()
        for file in graph.files:
            if not file.endswith(".onnx"):
                shutil.copyfile(graph.path.with_name(file), folder / name / file)
    seeds = [graph.data for graph in sound.values()]
    damaged = graph_mutations(seeds, count, seed=seed)
    check(graph_fuzzer(sound, keep), seeds, count, damaged=damaged)
    for python in pythons():
        runtime_agrees(python, accepted)


def test_few(sound, tmp_path):
    """A small corpus of mutations: only our own errors, in one line, quickly, in bounded memory."""
    fuzz(sound, FEW, 0, tmp_path)


@pytest.mark.slow
def test_many(sound, tmp_path):
    """The whole corpus."""
    fuzz(sound, MANY, 1, tmp_path)
