"""What may follow `is` in a chat template: jinja's tests, charged where their work depends on the value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined

from edge_reasoner.contract.template.guard import Budget
from edge_reasoner.contract.template.operators import COMPARISONS
from edge_reasoner.contract.template.values import Builtin, Loop, Macro, Method, text

_OPAQUE: Final = (Builtin, Loop, Macro, Method)


def _cased(name: str) -> Callable[[Budget, Any], bool]:
    method = getattr(str, name)
    return lambda budget, value: bool(method(text(budget, value)))


def _is_sequence(_: Budget, value: Any) -> bool:
    return isinstance(value, (Sequence, Mapping, Undefined)) and not isinstance(value, _OPAQUE)


def _is_iterable(_: Budget, value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, _OPAQUE)


def _remainder(value: Any, by: Any) -> Any:
    if isinstance(value, str):  # to Python it is a format
        raise TypeError("a text has no remainder")
    return value % by


def _compared(name: str) -> Callable[[Budget, Any, Any], bool]:
    return COMPARISONS[name]


#: tests whose work does not depend on the value: called without being counted
PLAIN: Final[Mapping[str, Callable[..., bool]]] = MappingProxyType(
    {
        "boolean": lambda _, value: value is True or value is False,
        "callable": lambda _, value: isinstance(value, (Builtin, Macro, Method)),
        "defined": lambda _, value: not isinstance(value, Undefined),
        "false": lambda _, value: value is False,
        "float": lambda _, value: isinstance(value, float),
        "integer": lambda _, value: isinstance(value, int) and value is not True and value is not False,
        "iterable": _is_iterable,
        "mapping": lambda _, value: isinstance(value, Mapping),
        "none": lambda _, value: value is None,
        "number": lambda _, value: isinstance(value, (int, float)),
        "sequence": _is_sequence,
        "string": lambda _, value: isinstance(value, str),
        "true": lambda _, value: value is True,
        "undefined": lambda _, value: isinstance(value, Undefined),
    }
)
TESTS: Final[Mapping[str, Callable[..., bool]]] = MappingProxyType(
    {
        **PLAIN,
        "!=": _compared("ne"),
        "<": _compared("lt"),
        "<=": _compared("lteq"),
        "==": _compared("eq"),
        ">": _compared("gt"),
        ">=": _compared("gteq"),
        "divisibleby": lambda _, value, by: _remainder(value, by) == 0,
        "eq": _compared("eq"),
        "equalto": _compared("eq"),
        "escaped": lambda _, value: hasattr(value, "__html__"),
        "even": lambda _, value: _remainder(value, 2) == 0,
        "ge": _compared("gteq"),
        "greaterthan": _compared("gt"),
        "gt": _compared("gt"),
        "in": _compared("in"),
        "le": _compared("lteq"),
        "lessthan": _compared("lt"),
        "lower": _cased("islower"),
        "lt": _compared("lt"),
        "ne": _compared("ne"),
        "odd": lambda _, value: _remainder(value, 2) == 1,
        "sameas": lambda _, value, other: value is other,
        "test": lambda _, value: isinstance(value, str) and value in TESTS,
        "upper": _cased("isupper"),
    }
)


def call_test(budget: Budget, name: Any, value: Any, args: tuple[Any, ...], named: dict[str, Any]) -> bool:
    """Applies a test by its name. Raises SecurityError for one that does not exist here."""
    found = TESTS.get(name) if isinstance(name, str) else None
    if found is None:
        raise SecurityError(f"No test named {name!r:.80}.")
    budget.step()
    return bool(found(budget, value, *args, **named))
