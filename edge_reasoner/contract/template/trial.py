"""Tries a chat template over the usual shapes of conversations, as the device would render them.

The exporter asks this before a bundle is made, so that a template that the device cannot use is found on the
workstation. A template may refuse a shape by its own `raise_exception` (Gemma 1 knows no system message);
that is an answer, not a fault.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Final

from edge_reasoner.contract.template.render import ChatTemplate, Message, TemplateRefusedError
from edge_reasoner.errors import TemplateError

_SYSTEM, _QUESTION, _ANSWER, _NEXT = "Answer briefly.", "Name a fruit.", "An apple.", "And a vegetable?"


def _turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    turns = [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
    return tuple(turns if system is None else [{"role": "system", "content": system}, *turns])


#: the one that every use of a model needs
SINGLE_TURN: Final = "one user message"
#: shape → messages; the names stand in messages to people
SHAPES: Final[Mapping[str, Sequence[Message]]] = MappingProxyType(
    {
        SINGLE_TURN: _turns(_QUESTION),
        "a system message": _turns(_QUESTION, system=_SYSTEM),
        "an empty system message": _turns(_QUESTION, system=""),
        "a second question": _turns(_QUESTION, _ANSWER, _NEXT),
        "several turns after a system message": _turns(
            _QUESTION, _ANSWER, _NEXT, "A leek.", "Thanks.", system=_SYSTEM
        ),
        "an empty message": _turns(""),
        "markup and other scripts in a message": _turns("{{ x }} {% y %} <b> größe 你好 🙂\n"),
    }
)


@dataclass(frozen=True)
class TemplateTrial:
    """What came of each shape.

    `failed` and `refused` map shapes to what the engine, or the template itself, said; `lost` are shapes
    whose prompt lacks a text of the conversation.
    """

    failed: Mapping[str, str]
    refused: Mapping[str, str]
    lost: tuple[str, ...]


def try_template(
    source: str,
    *,
    special_tokens: Mapping[str, str],
    clock: Callable[[], float],
    now: Callable[[], datetime],
) -> TemplateTrial:
    """Renders every shape. Raises TemplateError when the template cannot even be compiled."""
    template = ChatTemplate(source, special_tokens=special_tokens, clock=clock, now=now)
    failed: dict[str, str] = {}
    refused: dict[str, str] = {}
    lost: list[str] = []
    for name, messages in SHAPES.items():
        try:
            prompt = template.render(messages)
        except TemplateRefusedError as error:
            refused[name] = str(error)
        except TemplateError as error:
            failed[name] = str(error)
        else:
            if any(message["content"].strip() not in prompt for message in messages):
                lost.append(name)
    return TemplateTrial(MappingProxyType(failed), MappingProxyType(refused), tuple(lost))
