"""Every parameter of every public constructor: a value of ours comes out, or an error of ours."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hostile.values.odd import FLOATS, ODD, check_odd, is_number, name_of
from hypothesis import given
from hypothesis import strategies as st

from edge_export.options import ExportOptions
from edge_reasoner.bench.bench import BenchOptions
from edge_reasoner.chat.params import SamplingParams
from edge_reasoner.cloud import connect
from edge_reasoner.cloud.base import CloudLimits, CloudOptions, CloudPrice
from edge_reasoner.engine.loop import EngineLimits
from edge_reasoner.engine.prefix import CacheLimits
from edge_reasoner.engine.sampling import choose, filtered
from edge_reasoner.errors import InputError
from edge_reasoner.gate.policy import Policy

#: constructor -> what it needs at least
CONSTRUCTORS: dict[type, Mapping[str, Any]] = {
    SamplingParams: {},
    Policy: {},
    CloudLimits: {},
    CloudPrice: {"input_usd_per_mtok": 1.0, "output_usd_per_mtok": 1.0},
    CloudOptions: {"url": "http://127.0.0.1:1/v1"},
    CacheLimits: {},
    EngineLimits: {},
    BenchOptions: {},
    ExportOptions: {},
}
CASES = [(kind, field.name) for kind in CONSTRUCTORS for field in dataclasses.fields(kind) if field.init]


@pytest.mark.parametrize(("kind", "name"), CASES, ids=[f"{kind.__name__}-{name}" for kind, name in CASES])
def test_any_value(kind, name):
    """What is taken is of the type that the field says, finite, and can be shown, compared and hashed."""
    for value in check_odd(kind, CONSTRUCTORS[kind], name):
        made = kind(**{**CONSTRUCTORS[kind], name: value})
        repr(made)
        assert made == made
        kept = getattr(made, name)
        if isinstance(kept, float):
            assert math.isfinite(kept), name_of(value)
        assert not isinstance(kept, (np.generic, np.ndarray)) or isinstance(kept, float), name_of(value)
        annotated = str(next(field.type for field in dataclasses.fields(kind) if field.name == name))
        if "int" in annotated.split(" | ") or annotated == "float":
            assert kept is None or is_number(kept), name_of(value)


@pytest.mark.parametrize("value", ODD, ids=name_of)
def test_any_url_of_a_cloud(value):
    """Also what only connecting finds out."""
    for name in ("url", "model", "api_key_env"):
        try:
            connect(CloudOptions(**{"url": "http://127.0.0.1:1/v1", name: value})).close()
        except InputError as error:
            assert str(error).isprintable()
    try:
        connect(CloudOptions("http://127.0.0.1:1/v1"), value).close()
    except InputError as error:
        assert str(error).isprintable()


LOGITS = (
    np.array([1.0, 2.0, 2.0, -3.0], np.float32),
    np.array([0.0, -np.inf, -1e-38, 1e-38], np.float32),
    np.array([3e38, -3e38, 1e38, 0.0], np.float32),
    np.array([-3e38, -np.inf, -3.1e38, -3e38], np.float32),
    np.linspace(-40, 40, 5000).astype(np.float32),
)


@pytest.mark.parametrize("name", ["temperature", "top_p", "min_p", "repetition_penalty"])
@pytest.mark.filterwarnings("error")
def test_legal_extremes_sample(name):
    """Whatever is taken, a token comes out, without a word from numpy; a tiny temperature is greedy."""
    legal = check_odd(SamplingParams, {"temperature": 1.0}, name)
    for value in [*legal, 0.01, 100.0 if name in ("temperature", "repetition_penalty") else 1.0]:
        params = SamplingParams(**{"temperature": 1.0, name: value})
        for logits in LOGITS:
            for seed in range(3):
                choice = choose(logits, params, np.random.default_rng(seed), [0, 1, len(logits) - 1])
                assert 0 <= choice.token_id < len(logits), (value, logits)
                if name == "temperature" and 0 < value < 1e-20:
                    assert float(logits.max()) - float(logits[choice.token_id]) <= 40 * value


@given(
    temperature=st.floats(0, 100, exclude_min=True),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    top_k=st.integers(0, 9),
    logits=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=8),
)
def test_any_legal_distribution(temperature, top_p, min_p, top_k, logits):
    """Candidates are never none, their probabilities sum to 1, one as likely as any is among them."""
    params = SamplingParams(temperature=temperature, top_p=top_p, min_p=min_p, top_k=top_k)
    row = np.array(logits, np.float32)
    ids, probabilities = filtered(row, params)
    assert len(ids) and np.isfinite(probabilities).all()
    assert abs(probabilities.sum() - 1) < 1e-9
    # what differs by less is as likely, to the last bit
    assert float(row.max()) - float(row[ids].max()) <= 1e-12 * temperature


@given(value=st.one_of(st.floats(), st.integers(), st.decimals(allow_nan=True), st.text(), st.binary()))
def test_any_number_anywhere(value):
    """hypothesis' own idea of edges, for every numeric field."""
    for kind, name in CASES:
        if "float" in str(kind.__dataclass_fields__[name].type) or "int" in str(
            kind.__dataclass_fields__[name].type
        ):
            try:
                kind(**{**CONSTRUCTORS[kind], name: value})
            except InputError as error:
                assert str(error).isprintable()


def test_the_table_has_edges():
    """The odd values hold what they are said to."""
    assert any(math.isnan(value) for value in FLOATS) and 5e-324 in FLOATS and len(ODD) > 60
