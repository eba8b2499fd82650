"""Chat templates: messages to one prompt text, as transformers renders them, but bounded.

Templates come with models and are untrusted. Jinja only reads them: its tree is turned into functions of this
package (`statements.py`, `expressions.py`), which know a closed set of values, operators, filters and methods
and charge each operation to a budget (`guard.py`). No Python code is made of a template, and a template
reaches no Python object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2

from edge_reasoner.contract.template.expressions import Scope
from edge_reasoner.contract.template.guard import Budget
from edge_reasoner.contract.template.parse import parse
from edge_reasoner.contract.template.statements import TemplateCompiler
from edge_reasoner.contract.template.values import Builtin, make_dict, make_namespace, make_range, text
from edge_reasoner.errors import TemplateError, one_line

TEMPLATE_FILE = "chat_template.jinja"
MAX_TEMPLATE_BYTES = 256 * 1024
#: characters of a rendered prompt
MAX_OUTPUT_CHARS = 4_000_000
MAX_MESSAGES = 2_000
_MAX_DATE_FORMAT_CHARS = 100

#: One chat message: `role` and `content`, and whatever else a template reads.
Message = Mapping[str, Any]

# What reading and rendering a template can raise: jinja's parser, and Python's operators on the values.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    StopIteration,
    TypeError,
    ValueError,
)


class TemplateRefusedError(TemplateError):
    """The template itself refuses the conversation, by `raise_exception`."""


class _RefusedError(jinja2.TemplateRuntimeError):
    """`raise_exception` on its way out of the template."""


class ChatTemplate:
    """One template, ready to be rendered. Immutable, and safe to share between threads."""

    def __init__(
        self,
        source: str,
        *,
        special_tokens: Mapping[str, str],
        clock: Callable[[], float],
        now: Callable[[], datetime],
    ) -> None:
        """Reads `source`. Raises TemplateError when it is malformed or too large.

        `special_tokens` are the template's variables `bos_token`, `eos_token`, …; `clock` (monotonic seconds)
        bounds a rendering, `now` answers the template's `strftime_now`.
        """
        if len(source.encode("utf-8", "replace")) > MAX_TEMPLATE_BYTES:
            raise TemplateError(f"chat template: larger than {MAX_TEMPLATE_BYTES} bytes")
        self._now = now
        self._clock = clock
        self._fixed_values: dict[str, Any] = {
            "dict": Builtin("dict", make_dict),
            "namespace": Builtin("namespace", make_namespace),
            "raise_exception": Builtin("raise_exception", _raise_exception),
            "range": Builtin("range", make_range),
            "strftime_now": Builtin("strftime_now", self._strftime_now),
            "tools": None,
            "documents": None,
            **special_tokens,
        }
        try:
            self._run, self._size = TemplateCompiler().body(parse(source).body)
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
        budget = Budget(self._clock)
        scope = Scope(budget, None)
        scope.update(self._fixed_values)
        scope.update(variables or {})
        scope["messages"] = [dict(message) for message in messages]
        scope["add_generation_prompt"] = add_generation_prompt
        pieces: list[str] = []
        try:
            budget.body(self._size)
            self._run(scope, pieces.append)
        except _TEMPLATE_FAULTS as error:
            raise _as_template_error(error) from error
        prompt = "".join(pieces)
        if len(prompt) > MAX_OUTPUT_CHARS:
            raise TemplateError(f"chat template: its text exceeds {MAX_OUTPUT_CHARS} characters")
        return prompt

    def _strftime_now(self, budget: Budget, pattern: object) -> str:
        if not isinstance(pattern, str) or len(pattern) > _MAX_DATE_FORMAT_CHARS:
            raise jinja2.TemplateRuntimeError(
                "strftime_now: a date format of at most 100 characters is allowed"
            )
        return self._now().strftime(pattern)


def _raise_exception(budget: Budget, message: object) -> NoReturn:
    raise _RefusedError(text(budget, message))


def _as_template_error(error: BaseException) -> TemplateError:
    if isinstance(error, RecursionError):
        return TemplateError("chat template: nested too deeply")
    line = getattr(error, "lineno", None)
    where = f"chat template, line {line}" if isinstance(line, int) else "chat template"
    kind = TemplateRefusedError if isinstance(error, _RefusedError) else TemplateError
    said = error.message if isinstance(error, jinja2.TemplateSyntaxError) and error.message else error
    return kind(f"{where}: {one_line(said)}")
