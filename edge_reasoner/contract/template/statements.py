"""Statements of a chat template as functions: each takes the scope and where its text goes.

A statement gives `_NEXT`, or `_CONTINUE` or `_BREAK` for the loop around it. What runs a body charges the
number of the body's nodes first, so that a rendering's work is counted and not only timed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from jinja2 import nodes
from jinja2.exceptions import TemplateRuntimeError, TemplateSyntaxError
from jinja2.runtime import Undefined

from edge_reasoner.contract.template.expressions import Expression, ExpressionCompiler, Scope, invoke
from edge_reasoner.contract.template.guard import Budget, Namespace
from edge_reasoner.contract.template.values import Loop, Macro, listed, refused, text, unpacked

Write = Callable[[str], None]
Statement = Callable[[Scope, Write], int]
Assign = Callable[[Scope, Any], None]

_NEXT, _CONTINUE, _BREAK = 0, 1, 2
#: what an output of no characters costs
_PIECE_CHARS = 4
_IMPLICIT: Final = frozenset(("varargs", "kwargs", "caller"))


class TemplateCompiler(ExpressionCompiler):
    """Makes functions of a template's tree. Raises jinja2.TemplateSyntaxError."""

    def __init__(self) -> None:
        super().__init__()
        self.loops = 0

    def body(self, statements: Sequence[nodes.Node]) -> tuple[Statement, int]:
        """One function for statements that follow each other, and the number of nodes in it."""
        before = self.nodes
        made = [self._statement(node) for node in statements]
        size = self.nodes - before + 1
        if len(made) == 1:
            return made[0], size

        def run(scope: Scope, write: Write) -> int:
            for statement in made:
                if signal := statement(scope, write):
                    return signal
            return _NEXT

        return run, size

    def _statement(self, node: nodes.Node) -> Statement:
        make = _STATEMENTS.get(type(node))
        if make is None:
            raise TemplateSyntaxError(f"{type(node).__name__} is not available", node.lineno)
        self.enter(node)
        made = make(self, node)
        self.leave()
        return made

    def text_of(self, statements: Sequence[nodes.Node]) -> Expression:
        """A function that gives the text of statements, which run in a scope of their own."""
        run, size = self.body(statements)

        def written(scope: Scope) -> str:
            scope.budget.body(size)
            pieces: list[str] = []
            run(Scope(scope.budget, scope), pieces.append)
            return "".join(pieces)

        return written

    def target(self, node: nodes.Node) -> Assign:
        """What assigns a value to a name, to several, or to a field of a namespace."""
        self.enter(node)
        try:
            if isinstance(node, nodes.Name):
                return _to_name(node.name)
            if isinstance(node, nodes.NSRef):
                return _to_field(node.name, node.attr, self)
            if isinstance(node, nodes.Tuple):
                return _to_several([self.target(part) for part in node.items])
        finally:
            self.leave()
        raise TemplateSyntaxError(f"cannot assign to {type(node).__name__}", node.lineno)


def _to_name(name: str) -> Assign:
    def assign(scope: Scope, value: Any) -> None:
        scope[name] = value

    return assign


def _to_field(name: str, field: str, compiler: TemplateCompiler) -> Assign:
    namespace_of = compiler.expression(nodes.Name(name, "load", lineno=0))

    def assign(scope: Scope, value: Any) -> None:
        namespace = namespace_of(scope)
        if not isinstance(namespace, Namespace):
            raise TemplateRuntimeError("cannot assign attribute on non-namespace object")
        namespace.attributes[field] = value

    return assign


def _to_several(targets: Sequence[Assign]) -> Assign:
    def assign(scope: Scope, value: Any) -> None:
        for target, part in zip(targets, unpacked(scope.budget, value, len(targets)), strict=True):
            target(scope, part)

    return assign


def _output(compiler: TemplateCompiler, node: nodes.Output) -> Statement:
    made = [_printed(compiler, part) for part in node.nodes]
    if len(made) == 1:
        return made[0]

    def output(scope: Scope, write: Write) -> int:
        for part in made:
            part(scope, write)
        return _NEXT

    return output


def _printed(compiler: TemplateCompiler, node: nodes.Expr) -> Statement:
    if isinstance(node, nodes.TemplateData):
        data, chars = node.data, len(node.data) + _PIECE_CHARS
        compiler.nodes += 1

        def literal(scope: Scope, write: Write) -> int:
            scope.budget.chars(chars)
            write(data)
            return _NEXT

        return literal
    value_of = compiler.expression(node)

    def printed(scope: Scope, write: Write) -> int:
        value = value_of(scope)
        if type(value) is not str:
            value = text(scope.budget, value)
        scope.budget.chars(len(value) + _PIECE_CHARS)
        write(value)
        return _NEXT

    return printed


def _if(compiler: TemplateCompiler, node: nodes.If) -> Statement:
    compiler.conditions += 1
    branches = [
        (compiler.expression(branch.test), compiler.body(branch.body)[0]) for branch in (node, *node.elif_)
    ]
    otherwise = compiler.body(node.else_)[0] if node.else_ else None
    compiler.conditions -= 1

    def choose(scope: Scope, write: Write) -> int:
        for test, body in branches:
            if test(scope):
                return body(scope, write)
        return _NEXT if otherwise is None else otherwise(scope, write)

    return choose


def _for(compiler: TemplateCompiler, node: nodes.For) -> Statement:
    items_of, assign = compiler.expression(node.iter), compiler.target(node.target)
    test = compiler.optional(node.test)
    compiler.loops += 1
    body, size = compiler.body(node.body)
    compiler.loops -= 1
    otherwise = compiler.body(node.else_)[0] if node.else_ else None

    def chosen(scope: Scope, values: Any) -> Sequence[Any]:
        items = listed(scope.budget, values)
        if test is None:
            return items
        kept = []
        for value in items:
            scope.budget.body(size)
            inner = Scope(scope.budget, scope)
            assign(inner, value)
            if test(inner):
                kept.append(value)
        return kept

    def run(scope: Scope, write: Write, values: Any, depth0: int) -> int:
        budget, items = scope.budget, chosen(scope, values)

        def again(budget: Budget, values: Any) -> str:
            budget.enter()
            pieces: list[str] = []
            run(scope, pieces.append, values, depth0 + 1)
            budget.depth -= 1
            return "".join(pieces)

        loop = Loop(items, depth0, again if node.recursive else None)
        for index, value in enumerate(items):
            budget.body(size)
            loop.index0 = index
            inner = Scope(budget, scope)
            inner["loop"] = loop
            assign(inner, value)
            if body(inner, write) == _BREAK:
                break
        if not items and otherwise is not None:
            return otherwise(Scope(budget, scope), write)
        return _NEXT

    return lambda scope, write: run(scope, write, items_of(scope), 0)


def _signal(signal: int, name: str) -> Callable[[TemplateCompiler, nodes.Node], Statement]:
    def compile_signal(compiler: TemplateCompiler, node: nodes.Node) -> Statement:
        if not compiler.loops:
            raise TemplateSyntaxError(f"'{name}' outside of a loop", node.lineno)
        return lambda scope, write: signal

    return compile_signal


def _assign(compiler: TemplateCompiler, node: nodes.Assign) -> Statement:
    assign, value_of = compiler.target(node.target), compiler.expression(node.node)

    def run(scope: Scope, write: Write) -> int:
        assign(scope, value_of(scope))
        return _NEXT

    return run


def _assign_block(compiler: TemplateCompiler, node: nodes.AssignBlock) -> Statement:
    loops, compiler.loops = compiler.loops, 0
    assign, value_of = compiler.target(node.target), compiler.text_of(node.body)
    compiler.loops = loops
    if node.filter is not None:
        value_of = compiler.filtered(node.filter, value_of)

    def run(scope: Scope, write: Write) -> int:
        assign(scope, value_of(scope))
        return _NEXT

    return run


def _filter_block(compiler: TemplateCompiler, node: nodes.FilterBlock) -> Statement:
    loops, compiler.loops = compiler.loops, 0
    value_of = compiler.filtered(node.filter, compiler.text_of(node.body))
    compiler.loops = loops

    def run(scope: Scope, write: Write) -> int:
        write(text(scope.budget, value_of(scope)))
        return _NEXT

    return run


def _with(compiler: TemplateCompiler, node: nodes.With) -> Statement:
    values = [compiler.expression(value) for value in node.values]
    targets = [compiler.target(target) for target in node.targets]
    body = compiler.body(node.body)[0]

    def run(scope: Scope, write: Write) -> int:
        inner = Scope(scope.budget, scope)
        for assign, value in zip(targets, [value(scope) for value in values], strict=True):
            assign(inner, value)
        return body(inner, write)

    return run


def _macro(compiler: TemplateCompiler, node: nodes.Macro) -> Statement:
    make = _macro_maker(compiler, node, node.name)
    name = node.name

    def define(scope: Scope, write: Write) -> int:
        scope[name] = make(scope)
        return _NEXT

    return define


def _macro_maker(
    compiler: TemplateCompiler, node: nodes.Macro | nodes.CallBlock, name: str
) -> Callable[[Scope], Macro]:
    """What makes the macro in the scope that its body sees."""
    loops, compiler.loops = compiler.loops, 0
    around, compiler.names = compiler.names, set()
    names = [argument.name for argument in node.args]
    defaults = [compiler.expression(value) for value in node.defaults]
    body, size = compiler.body(node.body)
    compiler.loops = loops
    implicit = (_IMPLICIT & compiler.names).difference(names)
    compiler.names |= around
    bind = _Binder(name, names, defaults, implicit)

    def make(scope: Scope) -> Macro:
        def call(budget: Budget, args: tuple[Any, ...], named: dict[str, Any]) -> str:
            budget.enter()
            budget.body(size)
            inner = Scope(budget, scope)
            bind(inner, args, named)
            pieces: list[str] = []
            body(inner, pieces.append)
            budget.depth -= 1
            return "".join(pieces)

        return Macro(name, call)

    return make


class _Binder:
    """Binds the arguments of a call to a macro's names, as jinja does."""

    def __init__(
        self, name: str, names: Sequence[str], defaults: Sequence[Expression], implicit: frozenset[str]
    ) -> None:
        self._name = name
        self._names = names
        self._defaults = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
        self._implicit = implicit

    def __call__(self, scope: Scope, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """Puts the arguments into `scope`. Raises TypeError for those that do not fit."""
        left = dict(named)
        for position, name in enumerate(self._names):
            if position < len(args):
                if name in left:
                    raise TypeError(f"macro {self._name!r} got multiple values for argument {name!r}")
                scope[name] = args[position]
            elif name in left:
                scope[name] = left.pop(name)
            elif name in self._defaults:
                scope[name] = self._defaults[name](scope)
            else:
                scope[name] = Undefined(f"parameter {name!r} was not provided", name=name)
        if "caller" in self._implicit:
            scope["caller"] = left.pop("caller", Undefined("No caller defined", name="caller"))
        if "kwargs" in self._implicit:
            scope["kwargs"], left = left, {}
        if left:
            raise TypeError(f"macro {self._name!r} takes no keyword argument {next(iter(left))!r}")
        if "varargs" in self._implicit:
            scope["varargs"] = args[len(self._names) :]
        elif len(args) > len(self._names):
            raise TypeError(f"macro {self._name!r} takes not more than {len(self._names)} argument(s)")


def _call_block(compiler: TemplateCompiler, node: nodes.CallBlock) -> Statement:
    make = _macro_maker(compiler, node, "caller")
    called_of, arguments = compiler.expression(node.call.node), compiler.arguments(node.call)

    def run(scope: Scope, write: Write) -> int:
        args, named = ((), {}) if arguments is None else arguments(scope)
        result = invoke(scope.budget, called_of(scope), args, {**named, "caller": make(scope)})
        write(text(scope.budget, result))
        return _NEXT

    return run


def _unavailable(name: str) -> Callable[[TemplateCompiler, nodes.Node], Statement]:
    """What is an error only where it is reached, as in jinja without a loader."""

    def compile_unavailable(compiler: TemplateCompiler, node: nodes.Node) -> Statement:
        def run(scope: Scope, write: Write) -> int:
            raise refused(name)

        return run

    return compile_unavailable


_STATEMENTS: Final[Mapping[type[nodes.Node], Callable[[TemplateCompiler, Any], Statement]]] = {
    nodes.Assign: _assign,
    nodes.AssignBlock: _assign_block,
    nodes.Block: _unavailable("block"),
    nodes.Break: _signal(_BREAK, "break"),
    nodes.CallBlock: _call_block,
    nodes.Continue: _signal(_CONTINUE, "continue"),
    nodes.Extends: _unavailable("extends"),
    nodes.FilterBlock: _filter_block,
    nodes.For: _for,
    nodes.FromImport: _unavailable("import"),
    nodes.If: _if,
    nodes.Import: _unavailable("import"),
    nodes.Include: _unavailable("include"),
    nodes.Macro: _macro,
    nodes.Output: _output,
    nodes.With: _with,
}
