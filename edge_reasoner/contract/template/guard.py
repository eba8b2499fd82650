"""A jinja environment in which a hostile chat template runs out of budget instead of time or memory.

Jinja's own sandbox keeps a template away from Python's internals; it does not bound work. Chat templates come
with models, so they are untrusted. Every way in which a template can repeat or grow is charged to a budget:

    loops and calls     each `for` is rewritten to count its items; every call counts (macros may recurse)
    text                every printed piece, `~`, `+`, `*`, `%`, replace, join, indent, tojson is sized first
    containers          a literal that nests others counts its expanded size, so [x, x] cannot double unseen
    numbers             powers and products are bounded in bits

Filters and methods that chat templates do not need (center, wordwrap, zfill, …) do not exist here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

#: loop items and calls of one rendering
MAX_STEPS = 100_000
#: characters handled by one rendering, intermediate results included
MAX_CHARS = 16 * 1024 * 1024
#: values in one container, nested ones counted each time they appear
MAX_CONTAINER_VALUES = 200_000
MAX_INTEGER_BITS = 4096
MAX_DEADLINE_S = 2.0

_ALLOWED_FILTERS = (
    *("abs", "attr", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float"),
    *("groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject"),
    *("rejectattr", "reverse", "safe", "select", "selectattr", "sort", "sum", "title", "trim", "unique"),
    "upper",
)
_TEXT_METHODS = (
    *("capitalize", "count", "endswith", "find", "index", "isalnum", "isalpha", "isdigit", "islower"),
    *("isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix"),
    *("removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split"),
    *("splitlines", "startswith", "strip", "swapcase", "title", "upper"),
)
_ALLOWED_METHODS = {
    str: frozenset(_TEXT_METHODS),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index")),
}
_WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*[\d*]")
_GUARD_TEXT, _GUARD_LOOP, _GUARD_CONCAT, _GUARD_LITERAL = "_text", "_loop", "_concat", "_literal"


class Budget:
    """What one rendering may still spend. Raises SecurityError when it runs out."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._deadline_s = clock() + MAX_DEADLINE_S
        self._steps = 0
        self._chars = 0

    def step(self, count: int = 1) -> None:
        """Charges loop items or calls, and checks the deadline."""
        self._steps += count
        if self._steps > MAX_STEPS:
            raise SecurityError(f"more than {MAX_STEPS} loop steps and calls")
        self.check_deadline()

    def check_deadline(self) -> None:
        """Raises when the rendering has taken too long."""
        if self._clock() > self._deadline_s:
            raise SecurityError(f"longer than {MAX_DEADLINE_S:g} s")

    def chars(self, count: int) -> None:
        """Charges characters about to be made."""
        self._chars += count
        if self._chars > MAX_CHARS:
            raise SecurityError(f"more than {MAX_CHARS} characters of text")

    def value(self, value: object) -> None:
        """Charges the text of a value about to be printed or joined."""
        if isinstance(value, str):
            self.chars(len(value))
        elif isinstance(value, (list, tuple, Mapping)):
            self.chars(expanded_size(value))
        elif isinstance(value, Namespace):
            raise SecurityError("a namespace cannot be printed")


def expanded_size(value: object) -> int:
    """Characters and values that printing `value` visits. Raises SecurityError past the bounds."""
    pending: list[object] = [value]
    values = chars = 0
    while pending:
        item = pending.pop()
        values += 1
        if isinstance(item, str):
            chars += len(item)
        elif isinstance(item, Mapping):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, (list, tuple)):
            pending.extend(item)
        elif isinstance(item, Namespace):
            raise SecurityError("a namespace cannot be put into a list or dict")
        if values + len(pending) > MAX_CONTAINER_VALUES or chars > MAX_CHARS:
            raise SecurityError(f"a container of more than {MAX_CONTAINER_VALUES} values")
    return values + chars


class _Items:
    """What a `for` iterates over: counted before it starts, timed while it runs."""

    def __init__(self, iterable: Iterable[Any], budget: Budget) -> None:
        self._items = list(iterable)
        self._budget = budget
        budget.step(len(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Any]:
        for item in self._items:
            self._budget.check_deadline()
            yield item


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox that transformers uses for chat templates, with a budget. One rendering at a time."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "**", "%"))

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, loopcontrols],
            optimized=False,
            cache_size=0,
            finalize=self._finalize,
        )
        self._clock = clock
        self.budget = Budget(clock)
        self.filters = {name: self.filters[name] for name in _ALLOWED_FILTERS if name in self.filters}
        self.filters |= {
            "tojson": self._tojson,
            "join": self._join,
            "replace": self._replace,
            "indent": self._indent,
            "format": self._format,
            "string": self._string,
            _GUARD_TEXT: pass_context(lambda _, text: self._finalize(text)),
            _GUARD_LOOP: pass_context(lambda _, iterable: self._loop(iterable)),
            _GUARD_CONCAT: pass_context(lambda _, parts: self._join(parts)),
            _GUARD_LITERAL: pass_context(lambda _, value: self._literal(value)),
        }
        for name in ("lipsum", "cycler", "joiner"):
            self.globals.pop(name, None)

    def renew_budget(self) -> None:
        """Gives the next rendering a fresh budget."""
        self.budget = Budget(self._clock)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Rewriter().visit(super()._parse(source, name, filename))
        return tree

    def call(  # jinja hides its own names the same way
        __self,  # noqa: N805
        __context: Context,
        __obj: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Calls `__obj` from the template, if it may be called at all."""
        budget = __self.budget
        budget.step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(__obj, LoopContext):
            args = (__self._loop(args[0]), *args[1:]) if args else args
        elif isinstance(owner, (str, list, tuple, dict)):
            allowed = next(names for kind, names in _ALLOWED_METHODS.items() if isinstance(owner, kind))
            if name not in allowed:
                raise SecurityError(f"the method {name!r} is not available in chat templates")
            if isinstance(owner, str) and name == "replace":
                return __self._replace(owner, *args)
            if isinstance(owner, str) and name == "join":
                return __self._join(args[0] if args else (), owner)
        elif name in ("format", "format_map") and not isinstance(__obj, Macro):
            raise SecurityError("str.format is not available in chat templates")
        result = super().call(__context, __obj, *args, **kwargs)
        if isinstance(result, (list, tuple, dict, str)):
            budget.value(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Applies an operator after bounding the size of its result."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_INTEGER_BITS:
                raise SecurityError(f"a number of more than {MAX_INTEGER_BITS} bits")
        elif operator == "*":
            for sized, times in ((left, right), (right, left)):
                if isinstance(sized, (str, list, tuple)) and isinstance(times, int):
                    self.budget.chars(expanded_size(sized) * max(times, 0))
        elif operator == "+":
            for sized in (left, right):
                if isinstance(sized, (str, list, tuple)):
                    self.budget.chars(len(sized))
        elif operator == "%" and isinstance(left, str):
            return self._format(left, *(right if isinstance(right, tuple) else (right,)))
        return super().call_binop(context, operator, left, right)

    def _finalize(self, value: Any) -> Any:
        self.budget.step()
        self.budget.value(value)
        return value

    def _loop(self, iterable: Any) -> _Items:
        return _Items(iterable, self.budget)

    def _literal(self, value: Any) -> Any:
        self.budget.chars(expanded_size(value))
        return value

    def _string(self, value: Any) -> str:
        self.budget.value(value)
        return str(value)

    def _join(self, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
        items = list(self._loop(value))
        if attribute is not None:
            items = [self.getitem(item, attribute) for item in items]
        self.budget.chars(len(d) * len(items))
        return d.join([self._string(item) for item in items])

    def _replace(self, s: str, old: str, new: str, count: int | None = -1) -> str:
        s, old, new = str(s), str(old), str(new)
        limit = -1 if count is None else count
        found = s.count(old) if limit < 0 else min(s.count(old), limit)
        self.budget.chars(len(s) + found * len(new))
        return s.replace(old, new, limit)

    def _indent(self, s: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        pad = width if isinstance(width, str) else " " * min(width, 1000)
        lines = str(s).split("\n")
        self.budget.chars(len(s) + len(pad) * len(lines))
        rest = [pad + line if line or blank else line for line in lines[1:]]
        return "\n".join([pad + lines[0] if first else lines[0], *rest])

    def _format(self, value: str, *args: Any, **kwargs: Any) -> str:
        if _WIDE_FORMAT.search(value):
            raise SecurityError("widths in % formats are not available in chat templates")
        for item in (value, *args, *kwargs.values()):
            self.budget.value(item)
        return str(value) % (kwargs or args)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # transformers' own filter: jinja's would escape HTML characters
        size = expanded_size(value)
        self.budget.chars(size * (1 + (min(indent, 1000) if isinstance(indent, int) else 0)))
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=min(indent, 1000) if isinstance(indent, int) else indent,
            separators=separators,
            sort_keys=sort_keys,
        )


class _Rewriter(NodeTransformer):
    """Puts guards around what repeats or grows."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = _guarded(node.iter, _GUARD_LOOP)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        return _guarded(nodes.List(node.nodes, lineno=node.lineno), _GUARD_CONCAT)

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802
        return _guarded(nodes.Const(node.data, lineno=node.lineno), _GUARD_TEXT)

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        if isinstance(node.value, float) and not math.isfinite(node.value):
            # jinja would write it into its code as a name: inf
            raise TemplateSyntaxError("a number that is not finite", node.lineno)
        return node

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self._literal(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return self._literal(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self._literal(node) if node.ctx == "load" else node

    def _literal(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _guarded(node, _GUARD_LITERAL)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks assistant text for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012  # jinja's own declaration is a plain set

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Returns the block's body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _guarded(node: nodes.Node, guard: str) -> nodes.Expr:
    return nodes.Filter(node, guard, [], [], None, None, lineno=node.lineno)
