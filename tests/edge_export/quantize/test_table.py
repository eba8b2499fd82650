"""The tables' rows are all there is to say: a quantizer that nobody has heard of exports a model."""

from __future__ import annotations

from types import MappingProxyType

import pytest
from support.tiny_checkpoints import write_checkpoint

import edge_export.quantize
from edge_export.options import ExportOptions
from edge_export.pipeline import export
from edge_export.quantize import DEFAULT_QUANTIZER, QUANTIZERS, QuantizerRow, make_quantizer
from edge_export.quantize.rtn import RoundToNearest
from edge_reasoner.contract.bundle.open import open_bundle
from edge_reasoner.errors import InputError


class Counting:
    """Round-to-nearest that notes which inputs it was shown."""

    def __init__(self) -> None:
        self.shown: list[bool] = []

    def quantize(self, weight, fmt, inputs=None):
        """As RoundToNearest."""
        self.shown.append(inputs is not None)
        return RoundToNearest().quantize(weight, fmt)


@pytest.mark.parametrize("uses_statistics", [False, True])
def test_a_new_row_is_all_that_a_quantizer_needs(uses_statistics, tmp_path, monkeypatch):
    """Options take its name, its row decides whether it sees calibration inputs, the manifest names it."""
    counting = Counting()
    row = QuantizerRow(lambda: counting, "counts", uses_statistics=uses_statistics)
    monkeypatch.setattr(edge_export.quantize, "QUANTIZERS", MappingProxyType({**QUANTIZERS, "counting": row}))
    write_checkpoint(tmp_path / "model")
    options = ExportOptions(recipe="int4", quantizer="counting", threads=1)
    export(str(tmp_path / "model"), "generic-x86", tmp_path / "out", options)
    plan = open_bundle(tmp_path / "out").component("reasoner").plan
    assert {unit["quantizer"] for unit in plan["units"]} == {"counting"}
    assert set(counting.shown) == {uses_statistics}
    assert (plan["calibration_sha256"] is not None) == uses_statistics


def test_without_the_row_the_name_is_refused():
    """Nothing registers itself: outside the test above the name is unknown."""
    with pytest.raises(InputError, match=f"allowed: {', '.join(QUANTIZERS)}$"):
        ExportOptions(quantizer="counting")


def test_rows_are_complete():
    """Every row makes a quantizer and says what it is; the default is one of them."""
    assert DEFAULT_QUANTIZER in QUANTIZERS
    for name, row in QUANTIZERS.items():
        assert row.summary and not row.summary.endswith(".") and hasattr(make_quantizer(name), "quantize")
