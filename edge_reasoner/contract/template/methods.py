"""Methods of texts, lists and mappings that chat templates may call, each charged before it works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from edge_reasoner.contract.template.guard import MAX_CONTAINER_VALUES, Budget, expanded_size
from edge_reasoner.contract.template.values import METHODS, listed, text

_Method = Callable[..., Any]


def call_method(budget: Budget, owner: Any, name: str, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """`owner.name(…)` for a name of `values.METHODS`."""
    if isinstance(owner, str):
        result = _TEXT[name](budget, str(owner), *args, **named)
        if isinstance(result, str):
            budget.chars(len(result))
        return result
    if isinstance(owner, Mapping):
        return _MAPPING[name](budget, owner, *args, **named)
    return _LIST[name](budget, owner, *args, **named)


def _plain(name: str) -> _Method:
    """A method whose work is linear in the text."""
    method = getattr(str, name)

    def plain(budget: Budget, owner: str, *args: Any, **named: Any) -> Any:
        budget.chars(len(owner) + sum(len(arg) for arg in args if isinstance(arg, (str, tuple))))
        return method(owner, *args, **named)

    return plain


def _searching(name: str) -> _Method:
    """A method that looks for a text."""
    method = getattr(str, name)
    backwards = name.startswith("r")

    def searching(budget: Budget, owner: str, wanted: Any, *args: Any) -> Any:
        budget.search(len(owner), len(wanted), backwards=backwards)
        return method(owner, wanted, *args)

    return searching


def _stripping(name: str) -> _Method:
    method = getattr(str, name)

    def stripping(budget: Budget, owner: str, chars: str | None = None) -> str:
        budget.search(len(owner), len(chars or ""), backwards=True)
        result: str = method(owner, chars)
        return result

    return stripping


def _affix(name: str) -> _Method:
    method = getattr(str, name)

    def affix(budget: Budget, owner: str, affixes: Any, *args: Any) -> Any:
        budget.chars(expanded_size(affixes))
        return method(owner, affixes, *args)

    return affix


def _splitting(name: str) -> _Method:
    method = getattr(str, name)
    backwards = name == "rsplit"

    def splitting(budget: Budget, owner: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        budget.search(len(owner), len(sep or ""), backwards=backwards)
        most = MAX_CONTAINER_VALUES if maxsplit < 0 else min(maxsplit, MAX_CONTAINER_VALUES)
        parts: list[str] = method(owner, sep, most)
        budget.values(len(parts))
        return parts

    return splitting


def _splitlines(budget: Budget, owner: str, keepends: bool = False) -> list[str]:
    budget.chars(2 * len(owner))
    ends = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
    budget.values(1 + sum(owner.count(end) for end in ends))
    return owner.splitlines(keepends)


def replace(budget: Budget, owner: str, old: Any, new: Any, count: int = -1) -> str:
    """`owner.replace(old, new, count)`."""
    budget.search(len(owner), len(old))
    found = owner.count(old)
    budget.chars((found if count < 0 else min(found, count)) * len(new))
    return owner.replace(old, new, count)


def join(budget: Budget, owner: str, values: Any) -> str:
    """`owner.join(values)`."""
    items = listed(budget, values)
    budget.chars(len(owner) * len(items))
    for value in items:
        text(budget, value)
    return owner.join(items)


_TEXT: Final[Mapping[str, _Method]] = {
    **{
        name: _plain(name)
        for name in METHODS[str]
        if name.startswith("is") or name in ("capitalize", "lower", "swapcase", "title", "upper")
    },
    **{
        name: _searching(name)
        for name in ("count", "find", "index", "partition", "rfind", "rindex", "rpartition")
    },
    **{name: _stripping(name) for name in ("lstrip", "rstrip", "strip")},
    **{name: _affix(name) for name in ("endswith", "startswith")},
    **{name: _plain(name) for name in ("removeprefix", "removesuffix")},
    "split": _splitting("split"),
    "rsplit": _splitting("rsplit"),
    "splitlines": _splitlines,
    "replace": replace,
    "join": join,
}


def _get(budget: Budget, owner: Mapping[Any, Any], key: Any, default: Any = None) -> Any:
    budget.chars(expanded_size(key))
    return owner.get(key, default)


def _copy_mapping(budget: Budget, owner: Mapping[Any, Any]) -> dict[Any, Any]:
    budget.values(2 * len(owner))
    return dict(owner)


_MAPPING: Final[Mapping[str, _Method]] = {
    "get": _get,
    "copy": _copy_mapping,
    "items": lambda budget, owner: owner.items(),
    "keys": lambda budget, owner: owner.keys(),
    "values": lambda budget, owner: owner.values(),
}


def _copy(budget: Budget, owner: list[Any]) -> list[Any]:
    budget.values(len(owner))
    return list(owner)


def _looked_for(name: str) -> _Method:
    def looked_for(budget: Budget, owner: Any, value: Any, *args: Any) -> Any:
        budget.chars(expanded_size(owner) + expanded_size(value))
        return getattr(owner, name)(value, *args)

    return looked_for


_LIST: Final[Mapping[str, _Method]] = {
    "copy": _copy,
    "count": _looked_for("count"),
    "index": _looked_for("index"),
}
