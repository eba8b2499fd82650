"""What the user of the export stage may choose. Every value is checked when the options are made.

Needs no torch, so that a command line can name what is allowed at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal, get_args

from edge_export.plan.recipes import DEFAULT_RECIPE, RECIPES
from edge_export.plan.target import MIN_CONTEXT_TOKENS
from edge_export.quantize import DEFAULT_QUANTIZER, quantizer_names
from edge_reasoner.errors import InputError
from edge_reasoner.files import exists
from edge_reasoner.machine.allowance import allowance

Task = Literal["auto", "causal-lm", "encoder"]
TASKS: Final[tuple[Task, ...]] = get_args(Task)
MAX_CONTEXT_TOKENS: Final = 1 << 24
MAX_THREADS: Final = 1024
MAX_VERSION: Final = 1 << 31
_MAX_TEXT: Final = 200
_MAX_NUMBER: Final = 1e300
_SHOWN: Final = 80


@dataclass(frozen=True)
class ExportOptions:
    """What the user may choose. Raises InputError (field, value, what is allowed) for any other value."""

    #: a name of `plan.recipes.RECIPES`
    recipe: str = DEFAULT_RECIPE
    task: Task = "auto"
    #: a name of `quantize.QUANTIZERS`
    quantizer: str = DEFAULT_QUANTIZER
    #: positions of the KV cache; None: the profile's
    context_tokens: int | None = None
    #: text files (.txt, .jsonl) to calibrate and to measure quality on; None: the built-in ones
    calibration: Path | None = None
    quality_text: Path | None = None
    #: a sentence encoder (path or hub id) to put beside the model, and its recipe
    preprocessor: str | None = None
    preprocessor_recipe: str = DEFAULT_RECIPE
    #: limits: the bundle's size (10⁶ bytes), predicted time of a decoded token or of an encoder's text, top-1
    #: agreement or mean cosine (0 to 1)
    max_size_mb: float | None = None
    max_latency_ms: float | None = None
    min_quality: float | None = None
    licence: str | None = None
    version: int = 1
    #: of this machine, to export with; default: what this process may use
    threads: int = field(default_factory=lambda: default_threads())
    dry_run: bool = False

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            allowed = None if value is None and entry.default is None else CHECKS[entry.name](value)
            if allowed is not None:
                raise InputError(f"{entry.name}={_shown(value)}: {allowed}")
        for name in ("calibration", "quality_text"):
            if (path := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(path))


def default_threads() -> int:
    """Threads that the machine's `allowance` gives this process."""
    return allowance(most_threads=MAX_THREADS).threads


#: says what is wrong with a value, or None
Check = Callable[[Any], "str | None"]


def _one_of(names: Callable[[], Any]) -> Check:
    def check(value: Any) -> str | None:
        known = tuple(names())
        return None if isinstance(value, str) and value in known else f"allowed: {', '.join(known)}"

    return check


def _count(least: int, most: int) -> Check:
    def check(value: Any) -> str | None:
        counts = isinstance(value, int) and not isinstance(value, bool)
        return None if counts and least <= value <= most else f"allowed: whole numbers from {least} to {most}"

    return check


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _MAX_NUMBER


def _positive(value: Any) -> str | None:
    return None if _is_number(value) and value > 0 else "allowed: numbers above 0"


def _share(value: Any) -> str | None:
    return None if _is_number(value) and 0 <= value <= 1 else "allowed: numbers from 0 to 1"


def _flag(value: Any) -> str | None:
    return None if isinstance(value, bool) else "allowed: True, False"


def _text(value: Any) -> str | None:
    fine = isinstance(value, str) and bool(value.strip()) and value.isprintable() and len(value) <= _MAX_TEXT
    return None if fine else f"allowed: one line of 1 to {_MAX_TEXT} characters"


def _model(value: Any) -> str | None:
    return None if isinstance(value, str) and value.strip() else "allowed: a path or a hub id"


def _file(value: Any) -> str | None:
    if not isinstance(value, (str, Path)):
        return "allowed: the path of a text file"
    path = Path(value)
    if exists(path) and path.is_dir():
        return "cannot be read: it is a folder; allowed: a text file"
    return None if exists(path) else "cannot be read: there is no such file; allowed: a text file"


def _shown(value: Any) -> str:
    """The value on one line: a path as it is, anything else as Python writes it."""
    try:
        text = str(value) if isinstance(value, Path) else repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"<{type(value).__name__}>"
    text = text if text.isprintable() else " ".join(ascii(text)[1:-1].split())
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


CHECKS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        "recipe": _one_of(lambda: RECIPES),
        "task": _one_of(lambda: TASKS),
        "quantizer": _one_of(quantizer_names),
        "context_tokens": _count(MIN_CONTEXT_TOKENS, MAX_CONTEXT_TOKENS),
        "calibration": _file,
        "quality_text": _file,
        "preprocessor": _model,
        "preprocessor_recipe": _one_of(lambda: RECIPES),
        "max_size_mb": _positive,
        "max_latency_ms": _positive,
        "min_quality": _share,
        "licence": _text,
        "version": _count(1, MAX_VERSION),
        "threads": _count(1, MAX_THREADS),
        "dry_run": _flag,
    }
)
