"""Expressions of a chat template as functions: each takes the scope it is evaluated in and gives its value.

The tree comes from jinja's parser. What is not listed in `_EXPRESSIONS` cannot be evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateAssertionError, TemplateSyntaxError
from jinja2.runtime import Undefined

from edge_reasoner.contract.template.filters import FILTERS
from edge_reasoner.contract.template.guard import MAX_INTEGER_BITS, Budget, a_kind
from edge_reasoner.contract.template.methods import call_method
from edge_reasoner.contract.template.operators import ARITHMETIC, COMPARISONS, add, joined
from edge_reasoner.contract.template.predicates import PLAIN, TESTS
from edge_reasoner.contract.template.values import (
    METHODS,
    Builtin,
    Loop,
    Macro,
    Method,
    attribute,
    charge_keys,
    item,
    sized,
)

#: nodes of a template's tree
MAX_TREE_NODES: Final = 30_000
#: nodes inside each other
MAX_TREE_DEPTH: Final = 120

_DICT_NAMES: Final = frozenset(dir(dict))


class Scope(dict[str, Any]):
    """Names of one block; what is not here is looked up in the one around it."""

    __slots__ = ("budget", "parent")

    def __init__(self, budget: Budget, parent: Scope | None) -> None:
        self.budget = budget
        self.parent = parent


Expression = Callable[[Scope], Any]


class ExpressionCompiler:
    """Makes functions of expressions, and counts nodes. Raises jinja2.TemplateSyntaxError past the bounds."""

    def __init__(self) -> None:
        self.nodes = 0
        self._depth = 0
        #: inside of a condition: what does not exist there is an error only where it is reached, as in jinja
        self.conditions = 0
        #: names that are read in what was compiled since this was emptied
        self.names: set[str] = set()

    def expression(self, node: nodes.Node) -> Expression:
        """The function of one expression."""
        make = _EXPRESSIONS.get(type(node))
        if make is None:
            raise TemplateSyntaxError(f"{type(node).__name__} is not available", node.lineno)
        self.enter(node)
        made = make(self, node)
        self.leave()
        return made

    def enter(self, node: nodes.Node) -> None:
        """Counts a node that is about to be compiled; `leave` ends it."""
        self.nodes += 1
        self._depth += 1
        if self.nodes > MAX_TREE_NODES:
            raise TemplateSyntaxError(f"more than {MAX_TREE_NODES} operations", node.lineno)
        if self._depth > MAX_TREE_DEPTH:
            raise TemplateSyntaxError("nested too deeply", node.lineno)

    def leave(self) -> None:
        """Ends what `enter` began."""
        self._depth -= 1

    def optional(self, node: nodes.Node | None) -> Expression | None:
        """The function of an expression that may be missing."""
        return None if node is None else self.expression(node)

    def filtered(self, node: nodes.Filter, inner: Expression | None) -> Expression:
        """A filter applied to its node, or where that is missing (a filter block) to `inner`."""
        if isinstance(node.node, nodes.Filter):
            self.enter(node)
            inner = self.filtered(node.node, inner)
            self.leave()
        elif node.node is not None:
            inner = self.expression(node.node)
        function = FILTERS.get(node.name)
        if inner is None or function is None:
            return self._missing(f"No filter named {node.name!r:.80}.", node)
        self.nodes += 1
        apply, value_of, arguments = function, inner, self.arguments(node)
        if arguments is None:

            def bare(scope: Scope) -> Any:
                budget = scope.budget
                budget.step()
                return apply(budget, value_of(scope))

            return bare
        args_of = arguments

        def with_arguments(scope: Scope) -> Any:
            budget = scope.budget
            budget.step()
            value = value_of(scope)
            args, named = args_of(scope)
            return apply(budget, value, *args, **named)

        return with_arguments

    def _missing(self, message: str, node: nodes.Expr) -> Expression:
        if not self.conditions:
            raise TemplateAssertionError(message, node.lineno)

        def missing(scope: Scope) -> Any:
            raise SecurityError(message)

        return missing

    def tested(self, node: nodes.Test) -> Expression:
        """`value is test`."""
        function, value_of, arguments = TESTS.get(node.name), self.expression(node.node), self.arguments(node)
        if function is None:
            return self._missing(f"No test named {node.name!r:.80}.", node)
        holds = function
        if arguments is None and node.name in PLAIN:
            return lambda scope: holds(scope.budget, value_of(scope))

        def test(scope: Scope) -> bool:
            budget = scope.budget
            budget.step()
            value = value_of(scope)
            args, named = ((), {}) if arguments is None else arguments(scope)
            return bool(holds(budget, value, *args, **named))

        return test

    def arguments(
        self, node: nodes.Call | nodes.Filter | nodes.Test
    ) -> Callable[[Scope], tuple[tuple[Any, ...], dict[str, Any]]] | None:
        """What evaluates the arguments of a call; None where there are none."""
        positional = [self.expression(arg) for arg in node.args or ()]
        named = [(str(pair.key), self.expression(pair.value)) for pair in node.kwargs or ()]
        more, more_named = self.optional(node.dyn_args), self.optional(node.dyn_kwargs)
        if not positional and not named and more is None and more_named is None:
            return None
        if not named and more is None and more_named is None:
            return lambda scope: (tuple([arg(scope) for arg in positional]), {})

        def evaluate(scope: Scope) -> tuple[tuple[Any, ...], dict[str, Any]]:
            args = [arg(scope) for arg in positional]
            keywords = {key: value(scope) for key, value in named}
            if more is not None:
                args.extend(_spread(scope.budget, more(scope)))
            if more_named is not None:
                mapping = more_named(scope)
                if not isinstance(mapping, Mapping):
                    raise TypeError("** needs a mapping")
                scope.budget.values(len(mapping))
                for key in mapping:
                    if not isinstance(key, str) or key in keywords:
                        raise TypeError("the names of arguments must be texts, each once")
                keywords.update(mapping)
            return tuple(args), keywords

        return evaluate


def _spread(budget: Budget, values: Any) -> Sequence[Any]:
    if not isinstance(values, (list, tuple)):
        raise TypeError("* needs a list")
    budget.values(len(values))
    return values


def invoke(budget: Budget, called: Any, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """Calls what a template calls. Raises TypeError for what cannot be called."""
    budget.step()
    budget.check_deadline()
    if isinstance(called, Method):
        return call_method(budget, called.owner, called.name, args, named)
    if isinstance(called, Builtin):
        return called.function(budget, *args, **named)
    if isinstance(called, Macro):
        return called.invoke(budget, args, named)
    if isinstance(called, Loop):
        if called.recurse is None:
            raise TypeError("The loop must have the 'recursive' marker to be called recursively.")
        return called.recurse(budget, *args, **named)
    if isinstance(called, Undefined):
        return called._fail_with_undefined_error()
    raise TypeError(f"{a_kind(called)} cannot be called")


def _name(compiler: ExpressionCompiler, node: nodes.Name) -> Expression:
    name = node.name
    compiler.names.add(name)

    def load(scope: Scope) -> Any:
        level: Scope | None = scope
        while level is not None:
            if name in level:
                return level[name]
            level = level.parent
        return Undefined(name=name)

    return load


def _const(compiler: ExpressionCompiler, node: nodes.Const) -> Expression:
    value = node.value
    if isinstance(value, float) and not math.isfinite(value):
        raise TemplateSyntaxError("a number that is not finite", node.lineno)
    if isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
        raise TemplateSyntaxError(f"a number of more than {MAX_INTEGER_BITS} bits", node.lineno)
    return lambda scope: value


def _template_data(compiler: ExpressionCompiler, node: nodes.TemplateData) -> Expression:
    data = node.data
    return lambda scope: data


def _getattr(compiler: ExpressionCompiler, node: nodes.Getattr) -> Expression:
    value_of, name, is_method = compiler.expression(node.node), node.attr, node.attr in _DICT_NAMES

    def get(scope: Scope) -> Any:
        value = value_of(scope)
        if type(value) is dict and not is_method:
            return value[name] if name in value else Undefined(obj=value, name=name)
        return attribute(value, name)

    return get


def _getitem(compiler: ExpressionCompiler, node: nodes.Getitem) -> Expression:
    value_of = compiler.expression(node.node)
    if isinstance(node.arg, nodes.Slice):
        return _sliced(compiler, value_of, node.arg)
    key_of = compiler.expression(node.arg)
    if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
        name = node.arg.value

        def get(scope: Scope) -> Any:
            value = value_of(scope)
            if type(value) is dict and name in value:
                return value[name]
            return item(scope.budget, value, name)

        return get
    return lambda scope: item(scope.budget, value_of(scope), key_of(scope))


def _sliced(compiler: ExpressionCompiler, value_of: Expression, node: nodes.Slice) -> Expression:
    start, stop, step = (compiler.optional(bound) for bound in (node.start, node.stop, node.step))

    def cut(scope: Scope) -> Any:
        bounds = [None if bound is None else bound(scope) for bound in (start, stop, step)]
        return item(scope.budget, value_of(scope), slice(*bounds))

    return cut


def _call(compiler: ExpressionCompiler, node: nodes.Call) -> Expression:
    arguments = compiler.arguments(node)
    none: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
    if isinstance(node.node, nodes.Getattr):
        value_of, name = compiler.expression(node.node.node), node.node.attr
        of_text = name in METHODS[str]

        def call_attribute(scope: Scope) -> Any:
            value = value_of(scope)
            if of_text and type(value) is str:
                args, named = none if arguments is None else arguments(scope)
                scope.budget.step()
                return call_method(scope.budget, value, name, args, named)
            called = attribute(value, name)
            args, named = none if arguments is None else arguments(scope)
            return invoke(scope.budget, called, args, named)

        return call_attribute
    called_of = compiler.expression(node.node)

    def call(scope: Scope) -> Any:
        called = called_of(scope)
        args, named = none if arguments is None else arguments(scope)
        return invoke(scope.budget, called, args, named)

    return call


def _arithmetic(compiler: ExpressionCompiler, node: nodes.BinExpr) -> Expression:
    left, right = compiler.expression(node.left), compiler.expression(node.right)
    apply = ARITHMETIC[type(node).__name__]
    return lambda scope: apply(scope.budget, left(scope), right(scope))


def _add(compiler: ExpressionCompiler, node: nodes.Add) -> Expression:
    left_of, right_of = compiler.expression(node.left), compiler.expression(node.right)

    def sum_of(scope: Scope) -> Any:
        left, right = left_of(scope), right_of(scope)
        if type(left) is str and type(right) is str:
            scope.budget.chars(len(left) + len(right))
            return left + right
        return add(scope.budget, left, right)

    return sum_of


def _and(compiler: ExpressionCompiler, node: nodes.And) -> Expression:
    left, right = compiler.expression(node.left), compiler.expression(node.right)
    return lambda scope: left(scope) and right(scope)


def _or(compiler: ExpressionCompiler, node: nodes.Or) -> Expression:
    left, right = compiler.expression(node.left), compiler.expression(node.right)
    return lambda scope: left(scope) or right(scope)


def _not(compiler: ExpressionCompiler, node: nodes.Not) -> Expression:
    value = compiler.expression(node.node)
    return lambda scope: not value(scope)


def _negated(compiler: ExpressionCompiler, node: nodes.Neg) -> Expression:
    value = compiler.expression(node.node)
    return lambda scope: -value(scope)


def _positive(compiler: ExpressionCompiler, node: nodes.Pos) -> Expression:
    value = compiler.expression(node.node)
    return lambda scope: +value(scope)


def _compare(compiler: ExpressionCompiler, node: nodes.Compare) -> Expression:
    first = compiler.expression(node.expr)
    rest = [(COMPARISONS[operand.op], compiler.expression(operand.expr)) for operand in node.ops]
    if len(rest) == 1:
        compare, second = rest[0]
        return lambda scope: compare(scope.budget, first(scope), second(scope))

    def chain(scope: Scope) -> bool:
        left = first(scope)
        for compare, operand in rest:
            right = operand(scope)
            if not compare(scope.budget, left, right):
                return False
            left = right
        return True

    return chain


def _concat(compiler: ExpressionCompiler, node: nodes.Concat) -> Expression:
    parts = [compiler.expression(part) for part in node.nodes]
    return lambda scope: joined(scope.budget, [part(scope) for part in parts])


def _condition(compiler: ExpressionCompiler, node: nodes.CondExpr) -> Expression:
    compiler.conditions += 1
    test, first, second = (
        compiler.expression(node.test),
        compiler.expression(node.expr1),
        compiler.optional(node.expr2),
    )
    compiler.conditions -= 1
    hint = (
        f"the inline if-expression on line {node.lineno} evaluated to false and no else section was defined."
    )

    def choose(scope: Scope) -> Any:
        if test(scope):
            return first(scope)
        return Undefined(hint) if second is None else second(scope)

    return choose


def _list(compiler: ExpressionCompiler, node: nodes.List) -> Expression:
    values = [compiler.expression(value) for value in node.items]
    return lambda scope: sized(scope.budget, [value(scope) for value in values])


def _tuple(compiler: ExpressionCompiler, node: nodes.Tuple) -> Expression:
    values = [compiler.expression(value) for value in node.items]
    return lambda scope: sized(scope.budget, tuple([value(scope) for value in values]))


def _dict(compiler: ExpressionCompiler, node: nodes.Dict) -> Expression:
    pairs = [(compiler.expression(pair.key), compiler.expression(pair.value)) for pair in node.items]

    def make(scope: Scope) -> Any:
        made = {}
        for key_of, value_of in pairs:
            key = key_of(scope)
            sized(scope.budget, (key,))
            made[key] = value_of(scope)
        charge_keys(scope.budget, list(made))
        sized(scope.budget, tuple(made.values()))
        return made

    return make


_EXPRESSIONS: Final[Mapping[type[nodes.Node], Callable[[ExpressionCompiler, Any], Expression]]] = {
    nodes.Add: _add,
    nodes.And: _and,
    nodes.Call: _call,
    nodes.Compare: _compare,
    nodes.Concat: _concat,
    nodes.CondExpr: _condition,
    nodes.Const: _const,
    nodes.Dict: _dict,
    nodes.Div: _arithmetic,
    nodes.Filter: lambda compiler, node: compiler.filtered(node, None),
    nodes.FloorDiv: _arithmetic,
    nodes.Getattr: _getattr,
    nodes.Getitem: _getitem,
    nodes.List: _list,
    nodes.Mod: _arithmetic,
    nodes.Mul: _arithmetic,
    nodes.Name: _name,
    nodes.Neg: _negated,
    nodes.Not: _not,
    nodes.Or: _or,
    nodes.Pos: _positive,
    nodes.Pow: _arithmetic,
    nodes.Sub: _arithmetic,
    nodes.TemplateData: _template_data,
    nodes.Test: lambda compiler, node: compiler.tested(node),
    nodes.Tuple: _tuple,
}
