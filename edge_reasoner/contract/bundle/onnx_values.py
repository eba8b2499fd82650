"""What the rules of the operators reckon with: types and shapes of a graph's values, without its weights.

Dimensions are numbers, or symbols of what only a call knows: "batch", "tokens" (of this call), "total"
(tokens in the cache after it), "context" (room of the cache), "logits_to_keep", "states_to_keep".
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

from edge_reasoner.contract.bundle.onnx_scan import FLOAT, FLOAT16, INT64, Attribute, Dim, Node

FLOATS = frozenset({FLOAT, FLOAT16})
_MAX_RANK = 4
#: Numbers of a value for each token of a call: far above any model's widest layer.
_MAX_WIDTH = 1 << 18
#: The same for each row of logits, whose number the caller chooses.
_MAX_VOCABULARY = 1 << 22
#: The memory behind it is the caller's.
CACHE = "present"

Shape = tuple[Dim, ...]


class RuleError(ValueError):
    """A graph that the exporter would not write. Callers say which."""


@dataclass(frozen=True)
class Value:
    """A graph's value. `content`: its elements where they are known, numbers or symbols."""

    type: int
    shape: Shape
    #: the graph input that it is, CACHE for a layer's new key or value, or ""
    source: str = ""
    #: it is stored in the bundle, or a Cast of that
    stored: bool = False
    #: it is stored in the bundle and read as it lies there
    initializer: bool = False
    content: tuple[Dim, ...] | None = None


def require(condition: bool, what: str) -> None:
    """Raises RuleError with `what` unless the condition holds."""
    if not condition:
        raise RuleError(what)


@dataclass(frozen=True)
class Call:
    """A node with what its inputs are; None is an absent one."""

    node: Node
    inputs: tuple[Value | None, ...]

    def input(self, index: int) -> Value:
        """An input that must be there. Raises RuleError."""
        value = self.optional(index)
        if value is None:
            raise RuleError(f"input {index} is missing")
        return value

    def optional(self, index: int) -> Value | None:
        """An input, or None."""
        return self.inputs[index] if index < len(self.inputs) else None

    def integer(self, name: str, default: int = 0) -> int:
        """An attribute that `Operator` has checked to be an integer."""
        value = self.node.attributes.get(name, default)
        assert isinstance(value, int)
        return value

    def weight(self, index: int, shape: Shape, types: Container[int], *, plain: bool = False) -> Value:
        """An input that is stored, of that shape; `plain`: without a Cast. Raises RuleError."""
        value = self.input(index)
        if not (value.initializer if plain else value.stored):
            raise RuleError(f"input {index} must be an initializer")
        if value.shape != shape:
            raise RuleError(f"input {index} has the shape {_show(value.shape)}, not {_show(shape)}")
        if value.type not in types:
            raise RuleError(f"input {index} has a type that is not allowed")
        return value

    def constant(self, index: int, rank: int = 1) -> tuple[int, ...]:
        """The numbers of an int64 constant. Raises RuleError."""
        value = self.input(index)
        content = value.content
        numbers = tuple(n for n in content or () if isinstance(n, int))
        known = value.initializer and value.type == INT64 and content is not None
        require(known and len(value.shape) == rank, f"input {index} must be an int64 constant of rank {rank}")
        return numbers

    def floats(self, index: int, rank: int | None = None) -> Value:
        """An input of floats that is no weight, of that rank. Raises RuleError."""
        value = self.input(index)
        if value.type not in FLOATS or value.stored:
            raise RuleError(f"input {index} must be computed floats")
        if rank is not None and len(value.shape) != rank:
            raise RuleError(f"input {index} must have rank {rank}")
        return value


def _show(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def width(value: Value) -> int:
    """The last dimension, which must be a number. Raises RuleError."""
    last = value.shape[-1] if value.shape else ""
    if not isinstance(last, int):
        raise RuleError("the last dimension of an input must be a number")
    return last


def fits(small: Shape, large: Shape) -> bool:
    """Whether broadcasting `small` to `large` gives `large`."""
    offset = len(large) - len(small)
    return offset >= 0 and all(dim in (1, large[offset + index]) for index, dim in enumerate(small))


def broadcast(first: Shape, second: Shape) -> Shape:
    """The shape of both together. Raises RuleError."""
    rank = max(len(first), len(second))
    result: list[Dim] = []
    for a, b in zip(_padded(first, rank), _padded(second, rank), strict=True):
        require(a == b or 1 in (a, b), f"{_show(first)} and {_show(second)} do not go together")
        result.append(b if a == 1 else a)
    return tuple(result)


def _padded(shape: Shape, rank: int) -> Shape:
    return (1,) * (rank - len(shape)) + shape


def check_size(value: Value) -> None:
    """Bounds what computing a value can take. Raises RuleError."""
    symbols: list[str] = []
    numbers = 1
    for dim in value.shape:
        if isinstance(dim, int):
            numbers *= dim
        elif dim in symbols:
            raise RuleError(f"a value of the shape {_show(value.shape)}")
        else:
            symbols.append(dim)
    if len(value.shape) > _MAX_RANK:
        raise RuleError(f"a value of more than {_MAX_RANK} dimensions")
    limit = _MAX_VOCABULARY if "logits_to_keep" in symbols else _MAX_WIDTH
    if numbers > limit and not value.stored and value.source != CACHE:
        raise RuleError(f"a value of {numbers} numbers a row; at most {limit} are allowed")


@dataclass(frozen=True)
class Between:
    """Floats of an interval, its ends included."""

    low: float
    high: float

    def __contains__(self, value: object) -> bool:
        return isinstance(value, float) and self.low <= value <= self.high


@dataclass(frozen=True)
class Operator:
    """What may be written of an operator, and what comes out of it."""

    #: outputs of a call that `check` has passed
    rule: Callable[[Call], tuple[Value, ...]]
    inputs: range
    outputs: range = range(1, 2)
    required: Mapping[str, Container[Attribute]] = field(default_factory=dict)
    optional: Mapping[str, Container[Attribute]] = field(default_factory=dict)

    def check(self, node: Node) -> None:
        """Numbers of inputs and outputs, and attributes. Raises RuleError."""
        if len(node.inputs) not in self.inputs or len(node.outputs) not in self.outputs:
            raise RuleError(f"{len(node.inputs)} inputs and {len(node.outputs)} outputs")
        missing = len(self.required)
        for name, value in node.attributes.items():
            allowed = self.required.get(name)
            if allowed is not None:
                missing -= 1
            else:
                allowed = self.optional.get(name)
            # 1 == 1.0, but the runtime reads a float attribute as something else than an integer
            if (
                allowed is None
                or value not in allowed
                or isinstance(value, float) is not isinstance(allowed, Between)
            ):
                raise RuleError(f"attribute {name} with the value {str(value)[:40]!r} is not allowed")
        if missing:
            raise RuleError(f"it needs the attributes {', '.join(self.required)}")
