"""Measuring: which figures only a damaged model has."""

from __future__ import annotations

import pytest

from edge_export.stages.measure import quality_warnings


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ((400.0, 410.0), ()),
        ((12.0, 6.0), ()),
        ((1e304, 500.0), ("1e+304", "2e+301 times")),
        ((float("inf"), 500.0), ("inf",)),
        ((float("nan"), 500.0), ("nan",)),
        ((1e304, 1e304), ("own perplexity",)),
        ((500.0, 5.0), ("100 times",)),
    ],
)
def test_which_figures_are_warned_of(figures, words):
    """A model at chance, and what a coarse recipe costs, are none of it."""
    stored, original = figures
    given = {"perplexity": stored, "original_perplexity": original, "perplexity_ratio": stored / original}
    found = quality_warnings(given, 416)
    assert len(found) == bool(words) and all(word in found[0] for word in words)


@pytest.mark.parametrize(("cosine", "count"), [(0.99, 0), (0.1, 1), (float("nan"), 1)])
def test_which_cosines_are_warned_of(cosine, count):
    """An encoder whose stored vectors point elsewhere."""
    assert len(quality_warnings({"mean_cosine": cosine}, None)) == count
