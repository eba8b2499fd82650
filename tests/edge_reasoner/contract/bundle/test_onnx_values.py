"""Shapes: what goes together, and what is too large, as numpy has it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_reasoner.contract.bundle.onnx_scan import FLOAT
from edge_reasoner.contract.bundle.onnx_values import RuleError, Value, broadcast, check_size, fits

SHAPES = st.lists(st.integers(1, 3), max_size=4).map(tuple)


@given(first=SHAPES, second=SHAPES)
def test_broadcasting_is_numpys(first, second):
    """The same result, or a refusal where numpy refuses."""
    try:
        wanted = np.broadcast_shapes(first, second)
    except ValueError:
        with pytest.raises(RuleError):
            broadcast(first, second)
        assert not fits(first, second) and not fits(second, first)
        return
    assert broadcast(first, second) == wanted
    assert fits(first, second) == (wanted == second)


def test_symbols_only_go_with_themselves_and_1():
    """Two symbols are two sizes."""
    assert broadcast(("batch", 1, "tokens", 1), ("total",)) == ("batch", 1, "tokens", "total")
    with pytest.raises(RuleError, match="do not go together"):
        broadcast(("tokens",), ("total",))


@pytest.mark.parametrize(
    "shape",
    [
        ("tokens", "tokens"),
        ("batch", "tokens", (1 << 18) + 1),
        ("batch", "logits_to_keep", (1 << 22) + 1),
        (1, 1, 1, 1, 1),
    ],
)
def test_sizes_are_bounded(shape):
    """A square of the tokens, wide rows, a giant vocabulary, five dimensions."""
    with pytest.raises(RuleError):
        check_size(Value(FLOAT, shape))
    check_size(Value(FLOAT, ("batch", "logits_to_keep", 1 << 22)))
