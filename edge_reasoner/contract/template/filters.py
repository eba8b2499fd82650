"""Filters of chat templates: those of jinja and of transformers that templates use, each charged.

A filter gets the budget, the value and the arguments. What jinja gives as a generator is an iterator here
too: it is true whatever it holds, and empty once it was read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

from jinja2.exceptions import FilterArgumentError, SecurityError
from jinja2.runtime import Undefined
from markupsafe import Markup, escape

from edge_reasoner.contract.template import methods
from edge_reasoner.contract.template.guard import Budget, checked_integer, expanded_size, is_scalar
from edge_reasoner.contract.template.operators import ESCAPED_CHARS, add, percent
from edge_reasoner.contract.template.predicates import call_test
from edge_reasoner.contract.template.values import Group, attribute, charge_keys, item, length, listed, text

_WORD_START: Final = re.compile(r"([-\s({\[<]+)")
#: digits beyond this are no number that a template needs, and Python refuses them as well
_MAX_NUMBER_CHARS: Final = 1300
_MAX_INDENT: Final = 1000


def _default(budget: Budget, value: Any, default_value: Any = "", boolean: bool = False) -> Any:
    return default_value if isinstance(value, Undefined) or (boolean and not value) else value


def _int(budget: Budget, value: Any, default: Any = 0, base: int = 10) -> Any:
    if isinstance(value, str) and len(value) > _MAX_NUMBER_CHARS:
        return default
    try:
        return checked_integer(int(value, base) if isinstance(value, str) else int(value))
    except (TypeError, ValueError):
        try:
            return checked_integer(int(float(value)))
        except (TypeError, ValueError, OverflowError):
            return default


def _float(budget: Budget, value: Any, default: Any = 0.0) -> Any:
    if isinstance(value, str) and len(value) > _MAX_NUMBER_CHARS:
        return default
    try:
        return float(value)
    except (TypeError, ValueError):
        return default


def _string(budget: Budget, value: Any) -> str:
    return value if isinstance(value, Markup) else text(budget, value)


def _text_method(name: str) -> Callable[..., str]:
    def changed(budget: Budget, value: Any) -> str:
        return str(methods.call_method(budget, _string(budget, value), name, (), {}))

    return changed


def _trim(budget: Budget, value: Any, chars: str | None = None) -> str:
    if type(value) is str and chars is None:
        budget.chars(len(value))
        return value.strip()
    return str(methods.call_method(budget, _string(budget, value), "strip", (chars,), {}))


def _title(budget: Budget, value: Any) -> str:
    words = _WORD_START.split(text(budget, value))
    budget.values(len(words))
    return "".join([word[0].upper() + word[1:].lower() for word in words if word])


def _escape(budget: Budget, value: Any) -> Markup:
    written = _string(budget, value)
    budget.chars(ESCAPED_CHARS * len(written))
    return escape(written)


def _safe(budget: Budget, value: Any) -> Markup:
    return Markup(_string(budget, value))  # no HTML is written anywhere


def _replace(budget: Budget, value: Any, old: Any, new: Any, count: int | None = None) -> str:
    whole, wanted, put = text(budget, value), text(budget, old), text(budget, new)
    return methods.replace(budget, whole, wanted, put, -1 if count is None else count)


def _join(budget: Budget, value: Any, d: Any = "", attribute: str | int | None = None) -> str:
    items = _looked_up(budget, listed(budget, value), attribute)
    between = text(budget, d)
    budget.chars(len(between) * len(items))
    return between.join([text(budget, entry) for entry in items])


def _indent(
    budget: Budget, value: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> str:
    pad = width if isinstance(width, str) else " " * min(width, _MAX_INDENT)
    lines: list[str] = methods.call_method(budget, text(budget, value) + "\n", "splitlines", (), {})
    budget.chars(sum(map(len, lines)) + (len(pad) + 1) * len(lines))
    rest = [pad + line if line or blank else line for line in lines[1:]]
    return "\n".join([pad + lines[0] if first else lines[0], *rest])


def _format(budget: Budget, value: Any, *args: Any, **named: Any) -> str:
    if args and named:
        raise FilterArgumentError("can't handle positional and keyword arguments at the same time")
    return percent(budget, text(budget, value), named or args)


def _tojson(
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # transformers' own filter: jinja's would escape HTML characters
    size, depth = expanded_size(value), _depth(value)
    wide = min(max(indent, 0), _MAX_INDENT) if isinstance(indent, int) else indent
    between = sum(map(len, separators)) if separators else 2
    spaces = wide if isinstance(wide, int) else len(wide or "")
    budget.chars(size * (1 + between + spaces * depth))
    written = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=wide, separators=separators, sort_keys=bool(sort_keys)
    )
    budget.chars(len(written))
    return written


def _depth(value: Any) -> int:
    """How deeply containers lie in each other; `expanded_size` has bounded it."""
    depth, level = 0, [value]
    while level:
        depth += 1
        inner: list[Any] = []
        for entry in level:
            if isinstance(entry, Mapping):
                inner.extend(child for child in entry.values() if not is_scalar(child))
            elif isinstance(entry, (list, tuple)):
                inner.extend(child for child in entry if not is_scalar(child))
        level = inner
    return depth


def _list(budget: Budget, value: Any) -> list[Any]:
    items = listed(budget, value)
    budget.values(len(items))
    return list(items)


def _items(budget: Budget, value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, Undefined):
        return iter(())
    if not isinstance(value, Mapping):
        raise TypeError("Can only get item pairs from a mapping.")
    budget.values(2 * len(value))
    return iter(list(value.items()))


def _first(budget: Budget, value: Any) -> Any:
    for entry in value if isinstance(value, Iterator) else listed(budget, value):
        return entry
    return Undefined("No first item, sequence was empty.")


def _last(budget: Budget, value: Any) -> Any:
    if isinstance(value, Iterator):
        raise TypeError("a generator has no last item")
    items = listed(budget, value)
    return items[-1] if items else Undefined("No last item, sequence was empty.")


def _reverse(budget: Budget, value: Any) -> Any:
    if isinstance(value, str):
        budget.chars(len(value))
        return value[::-1]
    items = listed(budget, value)
    budget.values(len(items))
    return iter(items[::-1])


def _getter(budget: Budget, name: str | int | None, default: Any = None) -> Callable[[Any], Any]:
    """What reads `name`, a path such as "a.0.b", out of an item."""
    if name is None:
        return lambda entry: entry
    parts: list[str | int] = [name] if isinstance(name, int) else []
    if isinstance(name, str):
        parts = [int(part) if part.isdigit() and len(part) < 10 else part for part in name.split(".")]
    budget.step(len(parts))

    def read(entry: Any) -> Any:
        for part in parts:
            budget.step()
            entry = item(budget, entry, part)
            if default is not None and isinstance(entry, Undefined):
                entry = default
        return entry

    return read


def _looked_up(budget: Budget, items: Sequence[Any], name: str | int | None) -> Sequence[Any]:
    if name is None:
        return items
    read = _getter(budget, name)
    return [read(entry) for entry in items]


def _keys(
    budget: Budget, items: Sequence[Any], name: str | int | None, case_sensitive: bool, default: Any = None
) -> list[Any]:
    """What items are compared by, charged for a sort of all of them."""
    read = _getter(budget, name, default)
    keys = [read(entry) for entry in items]
    if not case_sensitive:
        keys = [_folded(budget, key) for key in keys]
    budget.values(len(keys))
    budget.chars(sum(map(expanded_size, keys)) * len(keys).bit_length())
    return keys


def _folded(budget: Budget, value: Any) -> Any:
    if isinstance(value, str):
        budget.chars(len(value))
        return value.lower()
    return value


def _order(keys: Sequence[Any], reverse: bool) -> list[int]:
    return sorted(range(len(keys)), key=keys.__getitem__, reverse=reverse)


def _sort(
    budget: Budget,
    value: Any,
    reverse: bool = False,
    case_sensitive: bool = False,
    attribute: str | None = None,
) -> list[Any]:
    items = listed(budget, value)
    parts: list[str | int | None] = list(attribute.split(",")) if isinstance(attribute, str) else [attribute]
    columns = [_keys(budget, items, part, case_sensitive) for part in parts]
    keys = columns[0] if len(columns) == 1 else list(zip(*columns, strict=True))
    return [items[i] for i in _order(keys, bool(reverse))]


def _dictsort(
    budget: Budget, value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False
) -> list[Any]:
    if by not in ("key", "value"):
        raise FilterArgumentError('You can only sort by either "key" or "value"')
    if not isinstance(value, Mapping):
        raise TypeError("dictsort needs a mapping")
    budget.step(len(value))
    pairs = list(value.items())
    keys = _keys(budget, pairs, 0 if by == "key" else 1, case_sensitive)
    return [pairs[i] for i in _order(keys, bool(reverse))]


def _groupby(
    budget: Budget, value: Any, attribute: str | int, default: Any = None, case_sensitive: bool = False
) -> list[Group]:
    items = listed(budget, value)
    keys = _keys(budget, items, attribute, case_sensitive, default)
    read = _getter(budget, attribute, default)
    groups: list[Group] = []
    last: Any = groups
    for i in _order(keys, False):
        if not groups or keys[i] != last:
            groups.append(Group(read(items[i]), []))
        groups[-1].list.append(items[i])
        last = keys[i]
    return groups


def _unique(
    budget: Budget, value: Any, case_sensitive: bool = False, attribute: str | int | None = None
) -> Iterator[Any]:
    items = listed(budget, value)
    keys = _keys(budget, items, attribute, case_sensitive)
    charge_keys(budget, keys)
    first: dict[Any, Any] = {}
    for entry, key in zip(items, keys, strict=True):
        first.setdefault(key, entry)
    return iter(list(first.values()))


def _extreme(choose: Callable[..., int]) -> Callable[..., Any]:
    def extreme(
        budget: Budget, value: Any, case_sensitive: bool = False, attribute: str | int | None = None
    ) -> Any:
        items = listed(budget, value)
        if not items:
            return Undefined("No aggregated item, sequence was empty.")
        keys = _keys(budget, items, attribute, case_sensitive)
        return items[choose(range(len(keys)), key=keys.__getitem__)]

    return extreme


def _sum(budget: Budget, value: Any, attribute: str | int | None = None, start: Any = 0) -> Any:
    if isinstance(start, str):
        raise TypeError("sum() can't sum strings")
    total = start
    for entry in _looked_up(budget, listed(budget, value), attribute):
        total = add(budget, total, entry)
    return total


def _attr(budget: Budget, value: Any, name: Any) -> Any:
    found = attribute(value, text(budget, name))
    if isinstance(value, Mapping) and not isinstance(found, (tuple, Undefined)):
        return Undefined(obj=value, name=name)  # items are not attributes
    return found


def _map(budget: Budget, value: Any, *args: Any, **named: Any) -> Iterator[Any]:
    items = listed(budget, value)
    if not args and "attribute" in named:
        name, default = named.pop("attribute"), named.pop("default", None)
        if named:
            raise FilterArgumentError(f"Unexpected keyword argument {next(iter(named))!r}")
        read = _getter(budget, name, default)
        return iter([read(entry) for entry in items])
    if not args:
        raise FilterArgumentError("map requires a filter argument")
    return iter([call_filter(budget, args[0], entry, args[1:], named) for entry in items])


def _chooser(wanted: bool, by_attribute: bool) -> Callable[..., Iterator[Any]]:
    """`select`, `reject`, `selectattr` and `rejectattr`."""

    def choose(budget: Budget, value: Any, *args: Any, **named: Any) -> Iterator[Any]:
        if not value:
            return iter(())
        if by_attribute and not args:
            raise FilterArgumentError("Missing parameter for attribute name")
        read = _getter(budget, args[0] if by_attribute else None)
        test = args[1:] if by_attribute else args
        kept = []
        for entry in listed(budget, value):
            found = read(entry)
            holds = call_test(budget, test[0], found, test[1:], named) if test else bool(found)
            if holds is wanted:
                kept.append(entry)
        budget.values(len(kept))
        return iter(kept)

    return choose


FILTERS: Final[Mapping[str, Callable[..., Any]]] = MappingProxyType(
    {
        "abs": lambda budget, value: abs(value),
        "attr": _attr,
        "capitalize": _text_method("capitalize"),
        "count": lambda budget, value: length(value),
        "d": _default,
        "default": _default,
        "dictsort": _dictsort,
        "e": _escape,
        "escape": _escape,
        "first": _first,
        "float": _float,
        "format": _format,
        "groupby": _groupby,
        "indent": _indent,
        "int": _int,
        "items": _items,
        "join": _join,
        "last": _last,
        "length": lambda budget, value: length(value),
        "list": _list,
        "lower": _text_method("lower"),
        "map": _map,
        "max": _extreme(max),
        "min": _extreme(min),
        "reject": _chooser(False, False),
        "rejectattr": _chooser(False, True),
        "replace": _replace,
        "reverse": _reverse,
        "safe": _safe,
        "select": _chooser(True, False),
        "selectattr": _chooser(True, True),
        "sort": _sort,
        "string": _string,
        "sum": _sum,
        "title": _title,
        "tojson": _tojson,
        "trim": _trim,
        "unique": _unique,
        "upper": _text_method("upper"),
    }
)


def call_filter(budget: Budget, name: Any, value: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Applies a filter by its name. Raises SecurityError for one that does not exist here."""
    found = FILTERS.get(name) if isinstance(name, str) else None
    if found is None:
        raise SecurityError(f"No filter named {name!r:.80}.")
    budget.step()
    budget.check_deadline()
    return found(budget, value, *args, **named)
