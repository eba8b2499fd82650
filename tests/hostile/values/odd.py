"""Values that nobody means: edges of every width, other types of numbers, half characters, containers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from edge_reasoner.errors import EdgeReasonerError


class _Rude:
    """Writes itself in two lines, one of them red."""

    def __repr__(self) -> str:
        return "a\n\x1b[31mb"


FLOATS = (
    0.0,
    -0.0,
    5e-324,
    1e-30,
    1e-9,
    0.5,
    1.0,
    1e30,
    1e308,
    -1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
)
INTEGERS = (0, 1, -1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**400, 10**5000, -(10**5000), True, False)
FOREIGN = (
    *(np.float32(0.5), np.float64("nan"), np.float64(0.5), np.int64(3), np.uint8(255), np.bool_(True)),
    *(np.array(1.0), np.array([1, 2]), Decimal("0.5"), Decimal("NaN"), Decimal("sNaN"), Decimal("1e999999")),
    *(Fraction(1, 3), 1j, object(), _Rude(), lambda *_: 0, Path("x"), NotImplemented, ...),
)
TEXTS = (
    *("", " ", "1", "nan", "x" * 100_000, "a\nb\x1b[31m", "\ud800", "\x00", "../..", "é你🙂", "\u202e"),
    *(b"", b"\xff", bytearray(b"1")),
)
CONTAINERS: tuple[Any, ...] = (
    *(None, [], (), {}, set(), [[]], [None], ("",), ("\ud800",), ["a", 1], range(3)),
    *({"a": 1}, {1: "a"}, {"a": "("}, {"a": None}),
)
ODD: tuple[Any, ...] = (*FLOATS, *INTEGERS, *FOREIGN, *TEXTS, *CONTAINERS)


def name_of(value: object) -> str:
    """A short name for a report."""
    try:
        return f"{type(value).__name__} {value!r}"[:60]
    except ValueError:
        return type(value).__name__


def check_odd(
    call: Callable[..., object], sound: Mapping[str, Any], parameter: str, *, path: bool = False
) -> list[Any]:
    """Calls with each odd value in the place of `parameter`; returns those that were taken.

    Whatever is not taken is refused by an error of the project, in one printable line. Only a `path` is shown
    as it is (the commands make it printable).
    """
    taken = []
    for value in ODD:
        try:
            call(**{**sound, parameter: value})
        except EdgeReasonerError as error:
            text = str(error)
            assert text and (path or (text.isprintable() and len(text) < 4000)), (parameter, name_of(value))
        except BaseException as error:
            raise AssertionError(f"{parameter}={name_of(value)}: {type(error).__name__}: {error}") from error
        else:
            taken.append(value)
    return taken


def is_number(value: object) -> bool:
    """What Python itself calls a number, but for bool and NaN."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
