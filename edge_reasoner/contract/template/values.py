"""The values of a chat template beside JSON's: macros, loops, methods; how they are read, and what is text.

A template sees no Python object: a value's attributes are the keys of a mapping, the fields of a loop or
namespace, and a short list of methods that `methods.py` carries out. Nothing else exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2.exceptions import SecurityError, TemplateRuntimeError
from jinja2.runtime import Undefined

from edge_reasoner.contract.template.guard import (
    MAX_STEPS,
    Budget,
    Namespace,
    a_kind,
    checked_integer,
    expanded_size,
    has_length,
    is_scalar,
)

#: characters that a place in a list counts for
_PLACE_CHARS = 4
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))

METHODS: dict[type, frozenset[str]] = {
    str: frozenset(
        (
            *("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower"),
            *("isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix"),
            *("removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split"),
            *("splitlines", "startswith", "strip", "swapcase", "title", "upper"),
        )
    ),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
}
_PYTHON_NAMES = {kind: frozenset(dir(kind)) for kind in METHODS}


#: what is iterated over without being a list
_MANY: tuple[type, ...] = (str, Mapping, range, *_VIEWS)


class Group(NamedTuple):
    """One group of the filter `groupby`."""

    grouper: Any
    list: list[Any]


@dataclass(slots=True, eq=False)
class Method:
    """A method of a value, not called yet."""

    owner: Any
    name: str


@dataclass(slots=True, eq=False)
class Builtin:
    """A function that the engine gives to templates: called with the budget first."""

    name: str
    function: Callable[..., Any]


@dataclass(slots=True, eq=False)
class Macro:
    """A macro or the `caller` of a call block: called with positional and named arguments."""

    name: str
    invoke: Callable[[Budget, tuple[Any, ...], dict[str, Any]], str]


class Loop:
    """The variable `loop` inside a `for`."""

    __slots__ = ("_changed", "depth0", "index0", "items", "recurse")

    def __init__(
        self, items: Sequence[Any], depth0: int, recurse: Callable[[Budget, Any], str] | None
    ) -> None:
        self.items = items
        self.index0 = 0
        self.depth0 = depth0
        self.recurse = recurse
        self._changed: tuple[Any, ...] | None = None

    def field(self, name: str) -> Any:
        """The value of `loop.name`."""
        read = _LOOP_FIELDS.get(name)
        return Undefined(obj=self, name=name) if read is None else read(self)

    def cycle(self, budget: Budget, *values: Any) -> Any:
        """The value whose turn it is."""
        if not values:
            raise TypeError("no items for cycling given")
        return values[self.index0 % len(values)]

    def changed(self, budget: Budget, *values: Any) -> bool:
        """Whether the values differ from those of the last call."""
        for value in (*values, *(self._changed or ())):
            budget.chars(expanded_size(value))
        before, self._changed = self._changed, values
        return before != values


_LOOP_FIELDS: dict[str, Callable[[Loop], Any]] = {
    "index": lambda loop: loop.index0 + 1,
    "index0": lambda loop: loop.index0,
    "revindex": lambda loop: len(loop.items) - loop.index0,
    "revindex0": lambda loop: len(loop.items) - loop.index0 - 1,
    "first": lambda loop: loop.index0 == 0,
    "last": lambda loop: loop.index0 == len(loop.items) - 1,
    "length": lambda loop: len(loop.items),
    "depth": lambda loop: loop.depth0 + 1,
    "depth0": lambda loop: loop.depth0,
    "previtem": lambda loop: (
        loop.items[loop.index0 - 1] if loop.index0 else Undefined("there is no previous item")
    ),
    "nextitem": lambda loop: (
        loop.items[loop.index0 + 1]
        if loop.index0 + 1 < len(loop.items)
        else Undefined("there is no next item")
    ),
    "cycle": lambda loop: Builtin("cycle", loop.cycle),
    "changed": lambda loop: Builtin("changed", loop.changed),
}


def attribute(value: Any, name: str) -> Any:
    """`value.name`, as jinja finds it: a method first, then an item; undefined where there is none."""
    kind = dict if isinstance(value, Mapping) else type(value)
    if kind is dict:
        if name not in _PYTHON_NAMES[dict]:
            try:
                return value[name]
            except KeyError:
                return Undefined(obj=value, name=name)
        return _method(dict, value, name)
    if isinstance(value, Loop):
        return value.field(name)
    if isinstance(value, Namespace):
        found = value.attributes.get(name, value)
        return Undefined(obj=value, name=name) if found is value else found
    if isinstance(value, Undefined):
        return value._fail_with_undefined_error()
    if isinstance(value, Group) and name in Group._fields:
        return value[Group._fields.index(name)]
    if isinstance(value, Macro) and name == "name":
        return value.name
    for base in (str, list, tuple):
        if isinstance(value, base):
            return _method(base, value, name)
    return Undefined(obj=value, name=name)


def _method(kind: type, value: Any, name: str) -> Any:
    if name in METHODS[kind]:
        return Method(value, name)
    if name in _PYTHON_NAMES[kind]:
        return Undefined(
            f"{kind.__name__}.{name} is not available in chat templates",
            obj=value,
            name=name,
            exc=SecurityError,
        )
    return Undefined(obj=value, name=name)


def item(budget: Budget, value: Any, key: Any) -> Any:
    """`value[key]`, as jinja finds it: an item first, then a method; undefined where there is none."""
    if isinstance(value, (Namespace, Loop, Macro, Method, Builtin)):
        return attribute(value, key) if isinstance(key, str) else Undefined(obj=value, name=key)
    if isinstance(value, Undefined):
        return value._fail_with_undefined_error()
    if not is_scalar(key) and not isinstance(key, slice):
        budget.chars(expanded_size(key))
    try:
        found = value[key]
    except (TypeError, LookupError, AttributeError):
        if isinstance(key, str):
            return attribute(value, key)
        return Undefined(obj=value, name=key)
    if isinstance(key, slice):
        budget.chars(len(found)) if isinstance(found, str) else budget.values(len(found))
    return found


def listed(budget: Budget, value: Any) -> Sequence[Any]:
    """The items of something that is iterated over, all of them, charged. Raises TypeError if it is not."""
    if isinstance(value, (list, tuple)):
        budget.step(len(value))
        return value
    if isinstance(value, _MANY):
        entries: Any = value
        budget.step(len(entries))
        return list(entries)
    if isinstance(value, (Undefined, Iterator)):
        items = list(value)
        budget.step(len(items))
        return items
    raise TypeError(f"{a_kind(value)} is not iterable")


def length(value: Any) -> int:
    """Number of items or characters. Raises TypeError where a value has none."""
    if not has_length(value) or isinstance(value, (Method, Builtin, Macro)):
        raise TypeError(f"{a_kind(value)} has no length")
    return len(value)


def text(budget: Budget, value: Any) -> str:
    """The value as it is printed, charged."""
    if isinstance(value, str):
        budget.chars(len(value))
        return str(value)
    if value is None or isinstance(value, (bool, int, float)):
        written = str(checked_integer(value))
        budget.chars(len(written))
        return written
    if isinstance(value, Undefined):
        return str(value)
    if isinstance(value, (list, tuple, Mapping)):
        budget.chars(expanded_size(value))
        written = str(value)
        budget.chars(len(written))
        return written
    if isinstance(value, range):
        return str(value)
    raise SecurityError(f"{a_kind(value)} cannot be printed")


def unpacked(budget: Budget, value: Any, count: int) -> Sequence[Any]:
    """The `count` items of a value that is assigned to several names."""
    items = value if isinstance(value, (tuple, list)) else listed(budget, value)
    if len(items) != count:
        raise ValueError(f"{len(items)} values for {count} names")
    return items


def make_namespace(budget: Budget, *args: Any, **fields: Any) -> Namespace:
    """`namespace(…)`."""
    return Namespace(make_dict(budget, *args, **fields))


def make_dict(budget: Budget, *args: Any, **fields: Any) -> dict[Any, Any]:
    """`dict(…)`."""
    if len(args) > 1:
        raise TypeError(f"dict expected at most 1 argument, got {len(args)}")
    if not args:
        made = dict(fields)
    elif isinstance(args[0], Mapping):
        budget.values(2 * len(args[0]))
        made = {**args[0], **fields}
    else:
        pairs = [unpacked(budget, pair, 2) for pair in listed(budget, args[0])]
        charge_keys(budget, [pair[0] for pair in pairs])
        made = {pair[0]: pair[1] for pair in pairs}
        made.update(fields)
    sized(budget, made.items())
    return made


def make_range(budget: Budget, *bounds: Any) -> range:
    """`range(…)`, as long as a loop may be."""
    made = range(*bounds)
    if len(made) > MAX_STEPS:
        raise SecurityError(f"a range of more than {MAX_STEPS} numbers")
    return made


def sized(budget: Budget, container: Any) -> Any:
    """A container that was just made, charged with all that is in it. Returns it."""
    budget.chars(_PLACE_CHARS * (1 + len(container)))
    for value in container:
        if not is_scalar(value):
            budget.chars(expanded_size(container))
            break
    return container


def charge_keys(budget: Budget, keys: Sequence[Any]) -> None:
    """Charges a mapping about to be made of `keys`: those that share a hash are compared with each other."""
    hashes: dict[int, int] = {}
    for key in keys:
        number = hash(key)
        same = hashes.get(number, 0)
        budget.chars(1 + same)
        hashes[number] = same + 1


def refused(name: str) -> TemplateRuntimeError:
    """The error of what chat templates do not have."""
    return SecurityError(f"{name} is not available in chat templates")
