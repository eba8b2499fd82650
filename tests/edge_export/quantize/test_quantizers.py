"""How well the quantizers do, on what they are for, and on weights that are no weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_export.quantize import QUANTIZERS, make_quantizer
from edge_export.quantize.base import InputStatistics
from edge_export.quantize.formats import BlockFormat
from edge_export.quantize.statistics import MAX_CORRELATED_COLUMNS, second_moments
from edge_reasoner.errors import CheckpointError

INT4 = BlockFormat(4, 32, False)
FORMATS = [BlockFormat(bits, 32, symmetric) for bits in (4, 8) for symmetric in (True, False)]


def weights(rows: int = 48, columns: int = 192, seed: int = 0) -> torch.Tensor:
    """Random weights."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def correlated_inputs(tokens: int = 600, columns: int = 192, seed: int = 1) -> torch.Tensor:
    """Inputs [tokens, columns] of low rank with unequal scales, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, 24, generator=generator) @ torch.randn(24, columns, generator=generator)
    noise = 0.3 * torch.randn(tokens, columns, generator=generator)
    return (mixed + noise) * torch.logspace(-1, 1, columns)


def output_error(inputs: torch.Tensor, weight: torch.Tensor, back: torch.Tensor) -> float:
    """‖X(W − Ŵ)ᵀ‖ / ‖X·Wᵀ‖."""
    return float((inputs @ (weight - back).T).norm() / (inputs @ weight.T).norm())


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
def test_a_searched_scale_is_never_worse(fmt):
    """Row by row and block by block, the weighted error of the search is at most round-to-nearest's."""
    weight, inputs = weights(), correlated_inputs()
    statistics = second_moments([inputs])
    importance = statistics.mean_square
    errors = {}
    for name in ("rtn", "searched"):
        back = make_quantizer(name).quantize(weight, fmt, statistics).dequantize()
        errors[name] = ((weight - back).square() * importance).reshape(48, -1, 32).sum(-1)
    # the search also gives every column a thousandth of the mean weight
    slack = 1e-3 * errors["rtn"].max()
    assert (errors["searched"] <= errors["rtn"] + slack).all()
    assert errors["searched"].sum() < (0.95 if fmt.bits == 4 else 1.0) * errors["rtn"].sum()


@pytest.mark.parametrize("fmt", FORMATS[:2], ids=lambda fmt: fmt.label)
def test_gptq_has_the_least_output_error(fmt):
    """On held-out inputs of the same distribution GPTQ beats the search, and the search beats rounding."""
    weight = weights()
    seen, unseen = correlated_inputs(1200).split(600)
    statistics = second_moments([seen[:100], seen[100:]])
    error = {
        name: output_error(unseen, weight, quantizer.quantize(weight, fmt, statistics).dequantize())
        for name, quantizer in ((name, make_quantizer(name)) for name in QUANTIZERS)
    }
    assert error["gptq"] < 0.8 * error["searched"] < 0.8 * error["rtn"]


def test_gptq_corrects_across_blocks():
    """The columns of later blocks make up for earlier ones: splitting the correlations costs accuracy."""
    weight, inputs = weights(), correlated_inputs()
    whole = second_moments([inputs])
    (correlation,) = whole.correlation
    diagonal = tuple(correlation[i : i + 32, i : i + 32] for i in range(0, 192, 32))
    errors = [
        output_error(inputs, weight, make_quantizer("gptq").quantize(weight, INT4, s).dequantize())
        for s in (whole, InputStatistics(whole.mean_square, diagonal))
    ]
    assert errors[0] < errors[1]


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_deterministic_and_rows_independent(name):
    """The same input gives the same bytes; slices of rows are what the whole gives; the input is untouched.

    GPTQ's matrix products may round differently for another number of rows, hence its tolerance.
    """
    quantizer, statistics = make_quantizer(name), second_moments([correlated_inputs()])
    weight = weights()
    before = weight.clone()
    whole, again = (quantizer.quantize(weight, INT4, statistics) for _ in range(2))
    assert torch.equal(weight, before)
    parts = [quantizer.quantize(part, INT4, statistics) for part in weight.split([5, 1, 42])]
    for field in ("packed", "scales", "zero_points"):
        assert np.array_equal(getattr(whole, field), getattr(again, field))
    sliced = torch.cat([part.dequantize() for part in parts])
    if name == "gptq":
        assert (sliced - whole.dequantize()).abs().gt(1e-4).float().mean() <= 0.005
    else:
        assert torch.equal(sliced, whole.dequantize())


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.label)
@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_unusual_weights(name, fmt):
    """Zeros stay exactly zero, constants and huge or tiny values come back finite and within half a step."""
    rows = {
        "zero": torch.zeros(80),
        "constant": torch.full((80,), 0.7),
        "negative": torch.full((80,), -3.0),
        "one outlier": torch.cat([torch.zeros(40), torch.tensor([1e30]), torch.zeros(39)]),
        "huge": torch.linspace(-1e30, 1e30, 80),
        "tiny": torch.linspace(-1e-30, 1e-30, 80),
    }
    weight = torch.stack(list(rows.values()))
    inputs = torch.randn(200, 80, generator=torch.Generator().manual_seed(2))
    for statistics in (None, second_moments([inputs]), second_moments([torch.zeros(4, 80)])):
        quantized = make_quantizer(name).quantize(weight, fmt, statistics)
        back = dict(zip(rows, quantized.dequantize(), strict=True))
        assert all(row.isfinite().all() for row in back.values()), name
        assert np.isfinite(quantized.scales).all()
        assert not back["zero"].any()
        tolerance = 0.08 if fmt.bits == 4 else 0.008
        if name != "gptq" or statistics is None:  # GPTQ trades a column's error for the output's
            for kind in ("constant", "negative", "huge"):
                worst = (back[kind] - rows[kind]).abs().max() / rows[kind].abs().max()
                assert worst <= 2 * tolerance, (kind, float(worst))


def test_second_moments_are_those_of_numpy():
    """Mean squares and correlations over all parts; wide inputs are cut into uncorrelated blocks."""
    inputs = torch.randn(50, MAX_CORRELATED_COLUMNS + 40, generator=torch.Generator().manual_seed(3))
    found = second_moments([inputs[:20], inputs[20:]])
    exact = inputs.double().numpy().T @ inputs.double().numpy() / 50
    assert np.allclose(found.mean_square, exact.diagonal(), rtol=1e-5)
    assert [len(block) for block in found.correlation] == [MAX_CORRELATED_COLUMNS, 40]
    assert np.allclose(found.correlation[1], exact[-40:, -40:], atol=1e-5)


def test_gptq_on_more_columns_than_are_correlated():
    """Beyond the correlated width GPTQ goes on block by block, still better than the search."""
    columns = 320
    weight, inputs = weights(16, columns), correlated_inputs(columns=columns)
    whole = second_moments([inputs])
    (correlation,) = whole.correlation
    cut = InputStatistics(whole.mean_square, (correlation[:256, :256], correlation[256:, 256:]))
    errors = {
        name: output_error(inputs, weight, make_quantizer(name).quantize(weight, INT4, cut).dequantize())
        for name in ("gptq", "searched")
    }
    assert errors["gptq"] < errors["searched"]


def test_inputs_beyond_float32_are_a_damaged_model():
    """Hidden states that overflow: one line of our own, not the library's error."""
    inputs = second_moments([correlated_inputs() * 1e20])
    with pytest.raises(CheckpointError, match="weights are damaged"):
        make_quantizer("gptq").quantize(weights(), INT4, inputs)
