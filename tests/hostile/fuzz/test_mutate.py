"""The fuzzing loop itself: deterministic, and it sees what it looks for."""

from __future__ import annotations

import pytest
from hostile.fuzz.mutate import check, mutations

from edge_reasoner.errors import InputError

SEEDS = (b'{"name": "tiny", "count": 3}', b"GGUF\x03\x00\x00\x00" + bytes(range(64)))


def test_mutations_are_deterministic():
    """The same arguments give the same mutations, another seed gives others, nearly all are damaged."""
    first = list(mutations(SEEDS, 200, seed=1))
    assert first == list(mutations(SEEDS, 200, seed=1)) != list(mutations(SEEDS, 200, seed=2))
    assert sum(data in SEEDS for data in first) < 20
    assert len(set(first)) > 150


def test_own_errors_pass_and_others_do_not():
    """An error of the project's tree is an answer; any other, or one of two lines, is a finding."""

    def refuse(data):
        if data not in SEEDS:
            raise InputError("no")

    def escape(data):
        if data not in SEEDS:
            raise ValueError("no")

    def two_lines(data):
        if data not in SEEDS:
            raise InputError("no\nno")

    check(refuse, SEEDS, 20)
    for target in (escape, two_lines):
        with pytest.raises(AssertionError, match="mutation 0"):
            check(target, SEEDS, 20)


def test_a_hang_is_found():
    """A call that never returns is stopped after its processor time and named."""

    def hang(data):
        while data not in SEEDS:
            pass

    with pytest.raises(AssertionError, match="mutation 0"):
        check(hang, SEEDS, 1)
