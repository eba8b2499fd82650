"""Chat templates: messages to one prompt text, as transformers renders them, but bounded.

Templates come with models and are untrusted; `guard.py` says how they are kept within bounds.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2

from edge_reasoner.contract.template.guard import GuardedEnvironment
from edge_reasoner.errors import TemplateError, one_line

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 256 * 1024
#: characters of a rendered prompt
MAX_OUTPUT_CHARS = 4_000_000
MAX_MESSAGES = 2_000
_MAX_DATE_FORMAT_CHARS = 100

#: One chat message: `role` and `content`, and whatever else a template reads.
Message = Mapping[str, Any]

# What a template can raise besides jinja's own errors: it becomes Python code, which is compiled and run.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    LookupError,
    MemoryError,
    NameError,
    OSError,
    RuntimeError,
    StopIteration,
    SyntaxError,
    SystemError,
    TypeError,
    ValueError,
)


class TemplateRefusedError(TemplateError):
    """The template itself refuses the conversation, by `raise_exception`."""


class _RefusedError(jinja2.TemplateRuntimeError):
    """`raise_exception` on its way out of the template."""


class ChatTemplate:
    """One compiled template. Thread-safe: renderings take turns."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        clock: Callable[[], float],
        now: Callable[[], datetime],
    ) -> None:
        """Compiles `source`. Raises TemplateError when it is malformed or too large.

        `special_tokens` are the template's variables `bos_token`, `eos_token`, …; `clock` (monotonic seconds)
        bounds a rendering, `now` answers the template's `strftime_now`.
        """
        if len(source.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
            raise TemplateError(f"chat template: larger than {MAX_TEMPLATE_BYTES} bytes")
        self._special_tokens = dict(special_tokens)
        self._now = now
        self._lock = threading.Lock()
        self._environment = GuardedEnvironment(clock)
        self._environment.globals["raise_exception"] = _raise_exception
        self._environment.globals["strftime_now"] = self._strftime_now
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's opinion of the code that a template becomes
                self._template = self._environment.from_string(source)
        except _TEMPLATE_FAULTS as error:
            raise _as_template_error(error) from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text for `messages`. Raises TemplateError: malformed, hostile or not applicable."""
        if len(messages) > MAX_MESSAGES:
            raise TemplateError(
                f"chat template: {len(messages)} messages; at most {MAX_MESSAGES} are allowed"
            )
        values: dict[str, Any] = {"tools": None, "documents": None, **self._special_tokens}
        values |= variables or {}
        values |= {
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        pieces: list[str] = []
        size_chars = 0
        with self._lock:
            self._environment.renew_budget()
            try:
                for piece in self._template.generate(values):
                    size_chars += len(piece)
                    if size_chars > MAX_OUTPUT_CHARS:
                        raise TemplateError(f"chat template: its text exceeds {MAX_OUTPUT_CHARS} characters")
                    pieces.append(piece)
            except _TEMPLATE_FAULTS as error:
                raise _as_template_error(error) from error
        return "".join(pieces)

    def _strftime_now(self, pattern: str) -> str:
        if not isinstance(pattern, str) or len(pattern) > _MAX_DATE_FORMAT_CHARS:
            raise jinja2.TemplateRuntimeError(
                "strftime_now: a date format of at most 100 characters is allowed"
            )
        return self._now().strftime(pattern)


def _raise_exception(message: object) -> NoReturn:
    raise _RefusedError(str(message))


def _as_template_error(error: BaseException) -> TemplateError:
    if isinstance(error, RecursionError):
        return TemplateError("chat template: nested too deeply")
    line = getattr(error, "lineno", None)
    where = f"chat template, line {line}" if isinstance(line, int) else "chat template"
    kind = TemplateRefusedError if isinstance(error, _RefusedError) else TemplateError
    return kind(f"{where}: {one_line(error)}")
