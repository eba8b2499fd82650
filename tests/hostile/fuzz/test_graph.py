"""Fuzzer of graphs: read and checked as a bundle's are, bytes and values damaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
from hostile.fuzz.mutate import FEW, MANY, check
from support.graph_mutations import graph_mutations
from support.hostile_graphs import Sound

from edge_reasoner.contract.bundle.graph_check import check_graph
from edge_reasoner.contract.bundle.onnx_scan import Known


def graph_fuzzer(sound: Mapping[str, Sound]) -> Callable[[bytes], None]:
    """`fuzz_graph` against the specs and files of these graphs; what two graphs share is read once."""
    files = {name: graph.files for name, graph in sound.items()}

    def fuzz_graph(data: bytes) -> None:
        """What passes names files of the bundle and nothing else."""
        base = "encoder" if b"attention_mask" in data else "packed" if b"MatMulNBits" in data else "normed"
        known: Known = {}
        found = check_graph(data, "g.onnx", sound[base].spec, files[base], known)
        assert set(found) <= files[base].keys()
        assert check_graph(memoryview(data), "g.onnx", sound[base].spec, files[base], known) == found

    return fuzz_graph


def fuzz(sound: Mapping[str, Sound], count: int, seed: int) -> None:
    """The seeds and `count` mutations of them."""
    seeds = [graph.data for graph in sound.values()]
    check(graph_fuzzer(sound), seeds, count, damaged=graph_mutations(seeds, count, seed=seed))


def test_few(sound):
    """A small corpus of mutations: only our own errors, in one line, quickly, in bounded memory."""
    fuzz(sound, FEW, 0)


@pytest.mark.slow
def test_many(sound):
    """The whole corpus."""
    fuzz(sound, MANY, 1)
