"""Checks of what an application gives: a legal value passes, anything else is an InputError in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from edge_reasoner.errors import InputError, shown
from edge_reasoner.files import is_unicode

#: where nothing else bounds a number: what native code can count to
MAX_INTEGER = 2**63 - 1


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    """Raises the InputError: which parameter, what it is, and what may be given."""
    raise InputError(f"{name}={shown(value)} is not allowed; give {allowed}")


def check_number(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """An int or a float from `low` to `high`; with `above` more than `low`. No bool, no NaN."""
    fine = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not fine or (above and value == low):
        refuse(
            name,
            value,
            f"a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}",
        )


def check_integer(name: str, value: object, low: int, high: int = MAX_INTEGER) -> None:
    """An int from `low` to `high`. No bool."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        span = f"of at least {low}" if high == MAX_INTEGER else f"from {low} to {high}"
        refuse(name, value, f"an integer {span}")


def check_flag(name: str, value: object) -> None:
    """True or False."""
    if not isinstance(value, bool):
        refuse(name, value, "True or False")


def check_text(name: str, value: object, what: str = "a text") -> None:
    """A str that can be written as UTF-8: no half characters."""
    if not isinstance(value, str) or not is_unicode(value):
        refuse(name, value, what)


def check_is(name: str, value: object, kind: type | tuple[type, ...], what: str) -> None:
    """An instance of `kind`."""
    if not isinstance(value, kind):
        refuse(name, value, what)


def check_texts(name: str, value: object, what: str) -> None:
    """A mapping of str to str."""
    if not isinstance(value, Mapping) or not all(
        isinstance(key, str) and isinstance(text, str) for key, text in value.items()
    ):
        refuse(name, value, what)
