"""What one rendering of a chat template may spend, and how large the values in it may become.

Templates come with models, so they are untrusted. Three counters bound a rendering, and every operation whose
cost depends on its operands charges them before it works:

    steps       one for each item that is iterated over, call, filter and test
    nodes       the size of a body, each time it runs: what costs the same whatever its operands are
    characters  text that is made, compared or searched; values of containers that are copied, compared,
                sorted or printed, each counted as often as it would be visited

Every single operation is small against the budget, so the deadline, which is looked at on every loop item and
call, holds as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sized
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.runtime import Undefined

#: loop items, calls, filters and tests of one rendering
MAX_STEPS = 100_000
#: parts of expressions and statements that one rendering carries out
MAX_NODES = 4_000_000
#: characters handled by one rendering, intermediate results included
MAX_CHARS = 16 * 1024 * 1024
#: values in one container, nested ones counted each time they appear
MAX_CONTAINER_VALUES = 200_000
#: containers inside each other
MAX_NESTING = 100
#: macros and recursive loops inside each other
MAX_CALL_DEPTH = 40
MAX_INTEGER_BITS = 4096
MAX_DEADLINE_S = 2.0
#: characters that a value in a container counts for: about what its object takes
_VALUE_CHARS = 8
_SCALARS = frozenset((str, int, bool, float, type(None)))


class Namespace:
    """What `namespace()` makes: the only value that can be changed. It is put into nothing, nor printed."""

    __slots__ = ("attributes",)

    def __init__(self, attributes: dict[str, Any]) -> None:
        self.attributes = attributes


class Budget:
    """What one rendering may still spend. Raises SecurityError when it runs out."""

    __slots__ = ("_chars_left", "_clock", "_deadline_s", "_nodes_left", "_steps_left", "depth")

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._deadline_s = clock() + MAX_DEADLINE_S
        self._steps_left = MAX_STEPS
        self._nodes_left = MAX_NODES
        self._chars_left = MAX_CHARS
        self.depth = 0

    def step(self, count: int = 1) -> None:
        """Charges loop items, calls, filters or tests."""
        self._steps_left -= count
        if self._steps_left < 0:
            raise SecurityError(f"more than {MAX_STEPS} loop steps and calls")

    def body(self, nodes: int) -> None:
        """Charges a body of `nodes` about to run, and checks the deadline."""
        self._nodes_left -= nodes
        if self._nodes_left < 0:
            raise SecurityError(f"more than {MAX_NODES} operations")
        if self._clock() > self._deadline_s:
            raise SecurityError(f"longer than {MAX_DEADLINE_S:g} s")

    def check_deadline(self) -> None:
        """Raises when the rendering has taken too long."""
        if self._clock() > self._deadline_s:
            raise SecurityError(f"longer than {MAX_DEADLINE_S:g} s")

    def chars(self, count: int) -> None:
        """Charges characters about to be made, compared or searched."""
        self._chars_left -= count
        if self._chars_left < 0:
            raise SecurityError(f"more than {MAX_CHARS} characters of text")

    def values(self, count: int) -> None:
        """Charges a container of `count` values about to be made."""
        if count > MAX_CONTAINER_VALUES:
            raise SecurityError(f"a container of more than {MAX_CONTAINER_VALUES} values")
        self.chars(_VALUE_CHARS * count)

    def search(self, text_chars: int, wanted_chars: int, *, backwards: bool = False) -> None:
        """Charges a search: Python's is linear forwards in long texts, and quadratic backwards."""
        compared = text_chars * wanted_chars
        self.chars(text_chars + (compared if backwards else min(compared, 3_000_000)) // 16)

    def enter(self) -> None:
        """Goes one macro or recursive loop deeper; `depth` is lowered by who leaves it."""
        if self.depth >= MAX_CALL_DEPTH:
            raise SecurityError(f"macros and loops nested more than {MAX_CALL_DEPTH} deep")
        self.depth += 1


def expanded_size(value: object) -> int:
    """Characters and values that visiting `value` whole meets. Raises SecurityError past the bounds."""
    kind = type(value)
    if kind is str:
        return 1 + len(value)  # type: ignore[arg-type]
    if kind in _SCALARS:
        return 1
    level: list[object] = [value]
    values = chars = depth = 0
    while level:
        values += len(level)
        depth += 1
        if values > MAX_CONTAINER_VALUES or chars > MAX_CHARS:
            raise SecurityError(f"a container of more than {MAX_CONTAINER_VALUES} values")
        if depth > MAX_NESTING:
            raise SecurityError(f"containers nested more than {MAX_NESTING} deep")
        inner: list[object] = []
        for item in level:
            if isinstance(item, str):
                chars += len(item)
            elif type(item) in _SCALARS:
                continue
            elif isinstance(item, (Mapping, list, tuple)) or _is_view(item):
                _open(item, inner, values)
            elif isinstance(item, range):
                values += len(item)
            elif not isinstance(item, (int, float, Undefined)):
                raise SecurityError(f"{a_kind(item)} cannot be put into a list or dict, compared or printed")
        level = inner
    return values + chars


def _open(container: Any, inner: list[object], values: int) -> None:
    """Appends the container's values, unless they are too many already."""
    count = len(container) * (2 if isinstance(container, Mapping) else 1)
    if values + len(inner) + count > MAX_CONTAINER_VALUES:
        raise SecurityError(f"a container of more than {MAX_CONTAINER_VALUES} values")
    if isinstance(container, Mapping):
        inner.extend(container.keys())
        inner.extend(container.values())
    else:
        inner.extend(container)


def _is_view(value: object) -> bool:
    return isinstance(value, _VIEWS)


_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))


def is_scalar(value: object) -> bool:
    """Whether the value is a text, number, truth value or None, of exactly that type."""
    return type(value) in _SCALARS


def checked_integer(value: Any) -> Any:
    """The value itself. Raises SecurityError for an integer that is too large."""
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise SecurityError(f"a number of more than {MAX_INTEGER_BITS} bits")
    return value


def a_kind(value: object) -> str:
    """What kind of thing a value is, for messages."""
    if value is None:
        return "none"
    return f"a {type(value).__name__.strip('_').lower().replace('_', ' ')}"


def has_length(value: object) -> bool:
    """Whether the value knows its length."""
    return isinstance(value, Sized)
