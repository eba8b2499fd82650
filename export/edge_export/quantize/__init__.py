"""Quantizers: weights in, frozen data out. A new one is one file and one row of `QUANTIZERS`.

Everything that is said about quantizers elsewhere (options, help, error texts, which of them need calibration
text) is read from the rows. The table itself needs no torch: a row's class is imported when it is used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from edge_export.quantize.base import Quantizer

DEFAULT_QUANTIZER = "gptq"


@dataclass(frozen=True)
class QuantizerRow:
    """One quantizer: how it is made, and what the other stages have to know about it."""

    make: Callable[[], Quantizer]
    #: for help texts, without a full stop
    summary: str
    #: it looks at the inputs that calibration text gives a matrix
    uses_statistics: bool


def _class(module: str, name: str) -> Callable[[], Quantizer]:
    def make() -> Quantizer:
        return cast("Quantizer", getattr(importlib.import_module(f"{__name__}.{module}"), name)())

    return make


QUANTIZERS: Mapping[str, QuantizerRow] = MappingProxyType(
    {
        "gptq": QuantizerRow(
            _class("gptq", "Gptq"),
            "columns make up for the rounding of earlier ones",
            uses_statistics=True,
        ),
        "searched": QuantizerRow(
            _class("rtn", "SearchedScale"), "round-to-nearest with searched scales", uses_statistics=True
        ),
        "rtn": QuantizerRow(_class("rtn", "RoundToNearest"), "plain round-to-nearest", uses_statistics=False),
    }
)


def quantizer_names() -> tuple[str, ...]:
    """All names, the default first."""
    return tuple(QUANTIZERS)


def quantizer_row(name: str) -> QuantizerRow:
    """The row of that name. Raises KeyError; what a user gave was checked by `ExportOptions`."""
    return QUANTIZERS[name]


def make_quantizer(name: str) -> Quantizer:
    """The quantizer of that name. Raises as `quantizer_row`."""
    return quantizer_row(name).make()


__all__ = [
    "DEFAULT_QUANTIZER",
    "QUANTIZERS",
    "QuantizerRow",
    "make_quantizer",
    "quantizer_names",
    "quantizer_row",
]
