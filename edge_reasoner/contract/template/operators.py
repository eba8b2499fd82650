"""Operators of chat templates: arithmetic, comparison, `in`, `~` and `%`, each charged before it works."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined
from markupsafe import Markup

from edge_reasoner.contract.template.guard import (
    MAX_INTEGER_BITS,
    Budget,
    checked_integer,
    expanded_size,
    is_scalar,
)
from edge_reasoner.contract.template.values import length, listed, text

#: what escaping makes of one character at most, as in &#34;
ESCAPED_CHARS: Final = 5
#: a % format: its parenthesized key, flags, width, precision, kind
_CONVERSION: Final = re.compile(r"%(\([^()%]*\))?([-+ #0]*)([\d*]*)(\.[\d*]*)?[hlL]?(.)", re.DOTALL)

_KINDS: Final = frozenset("diouxXeEfFgGcs%")
_PRECISE: Final = frozenset("eEfFgGs")
_MAX_PRECISION: Final = len(".99")


def add(budget: Budget, left: Any, right: Any) -> Any:
    """`left + right`."""
    if isinstance(left, str) and isinstance(right, str):
        chars = len(left) + len(right)
        escapes = isinstance(left, Markup) or isinstance(right, Markup)
        budget.chars(chars * ESCAPED_CHARS if escapes else chars)
        return left + right
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        budget.values(len(left) + len(right))
        budget.chars(expanded_size(left) + expanded_size(right))
        return left + right  # type: ignore[operator]
    return checked_integer(left + right)


def subtract(budget: Budget, left: Any, right: Any) -> Any:
    """`left - right`."""
    _refuse_views(left, right)
    return checked_integer(left - right)


def multiply(budget: Budget, left: Any, right: Any) -> Any:
    """`left * right`."""
    for sized, times in ((left, right), (right, left)):
        if isinstance(sized, (str, list, tuple)) and isinstance(times, int):
            if not isinstance(sized, str):
                budget.values(len(sized) * max(times, 0))
            budget.chars(expanded_size(sized) * max(times, 0))
            return left * right
    return checked_integer(left * right)


def modulo(budget: Budget, left: Any, right: Any) -> Any:
    """`left % right`: the remainder, or a text's format."""
    if isinstance(left, str):
        return percent(budget, left, right)
    return left % right


def power(budget: Budget, left: Any, right: Any) -> Any:
    """`left ** right`."""
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_INTEGER_BITS:
        raise SecurityError(f"a number of more than {MAX_INTEGER_BITS} bits")
    return left**right


ARITHMETIC: Final[Mapping[str, Callable[[Budget, Any, Any], Any]]] = {
    "Add": add,
    "Sub": subtract,
    "Mul": multiply,
    "Div": lambda budget, left, right: left / right,
    "FloorDiv": lambda budget, left, right: left // right,
    "Mod": modulo,
    "Pow": power,
}


def percent(budget: Budget, pattern: str, values: Any) -> str:
    """`pattern % values`, without widths and precisions, which make long texts of short ones."""
    pattern = str(pattern)
    budget.chars(len(pattern))
    given = values if isinstance(values, (tuple, Mapping)) else (values,)
    # a named value may be written several times
    times = max(1, pattern.count("%")) if isinstance(values, Mapping) else 1
    for value in given.values() if isinstance(given, Mapping) else given:
        if isinstance(value, (str, int, float, Undefined)) or value is None:
            budget.chars(times * (len(value) if isinstance(value, str) else 16))
            checked_integer(value)
        else:
            budget.chars(times * 10 * expanded_size(value))
    for match in _CONVERSION.finditer(pattern):
        _, _, width, precision, kind = match.groups()
        if width or kind not in _KINDS:
            raise SecurityError("only plain % formats, without a width, are available in chat templates")
        if precision and (kind not in _PRECISE or "*" in precision or len(precision) > _MAX_PRECISION):
            raise SecurityError("only % formats of at most 99 digits are available in chat templates")
    return str(pattern % values)


def joined(budget: Budget, values: Sequence[Any]) -> str:
    """`a ~ b ~ …`."""
    return "".join([text(budget, value) for value in values])


def equal(budget: Budget, left: Any, right: Any) -> bool:
    """`left == right`."""
    if isinstance(left, str) and isinstance(right, str):
        if len(left) != len(right):
            return False
        budget.chars(len(left))
        return left == right
    if not (is_scalar(left) or is_scalar(right)):
        _charge_both(budget, left, right)
    return bool(left == right)


def _ordered(compare: Callable[[Any, Any], bool]) -> Callable[[Budget, Any, Any], bool]:
    def ordered(budget: Budget, left: Any, right: Any) -> bool:
        if isinstance(left, str) and isinstance(right, str):
            budget.chars(min(len(left), len(right)))
        elif not (is_scalar(left) or is_scalar(right)):
            _charge_both(budget, left, right)
        return compare(left, right)

    return ordered


def contains(budget: Budget, wanted: Any, container: Any) -> bool:
    """`wanted in container`."""
    if isinstance(container, str):
        if isinstance(wanted, str):
            budget.search(len(container), len(wanted))
        return wanted in container
    if isinstance(container, Mapping):
        budget.chars(expanded_size(wanted))
        return wanted in container
    if isinstance(container, range):
        budget.step(len(container) if not isinstance(wanted, int) else 1)
        return wanted in container
    if isinstance(container, (Undefined, Iterator)):
        container = listed(budget, container)
    if is_scalar(wanted):  # compared with texts of its own length, and with nothing else in full
        budget.chars(length(container) * (1 + (len(wanted) if isinstance(wanted, str) else 0)))
    else:
        budget.chars(expanded_size(container) + expanded_size(wanted))
    return wanted in container


COMPARISONS: Final[Mapping[str, Callable[[Budget, Any, Any], bool]]] = {
    "eq": equal,
    "ne": lambda budget, left, right: not equal(budget, left, right),
    "lt": _ordered(operator.lt),
    "lteq": _ordered(operator.le),
    "gt": _ordered(operator.gt),
    "gteq": _ordered(operator.ge),
    "in": contains,
    "notin": lambda budget, left, right: not contains(budget, left, right),
}


def _charge_both(budget: Budget, left: Any, right: Any) -> None:
    for value in (left, right):
        if isinstance(value, (str, list, tuple, Mapping, range)):
            budget.chars(expanded_size(value))
        else:
            _refuse_views(value)


def _refuse_views(*values: Any) -> None:
    """Views of mappings are sets to Python: their differences and comparisons are nothing for templates."""
    for value in values:
        if isinstance(value, (type({}.keys()), type({}.items()))):
            raise TypeError("the keys and items of a mapping are not compared or subtracted")
