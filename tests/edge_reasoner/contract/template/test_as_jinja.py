"""The template engine beside jinja, set up as in transformers: the same text, or an error in both."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import jinja2
import pytest

from edge_reasoner.contract.template.render import ChatTemplate
from edge_reasoner.errors import TemplateError

#: one template in a line: each kind of statement, expression, filter, test and method
SNIPPETS = (Path(__file__).parent / "snippets.txt").read_text("utf-8").splitlines()
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
ARGUMENTS = {"a": 1, "b": [True, 1.5, "q"]}
MESSAGES = [
    {"role": "user", "content": "Hi <b> é\n there", "x": [1, 2, {"k": None}]},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": ARGUMENTS}}],
    },
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]},
]


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_as_jinja(number: int) -> None:
    """What jinja renders is rendered alike; what it refuses is refused."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = SNIPPETS[number]
    try:
        rendered, _ = utils.render_jinja_template(
            [MESSAGES], chat_template=source, add_generation_prompt=True, **SPECIAL
        )
        expected = rendered[0]
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError):
        expected = None
    try:
        got = ChatTemplate(source, special_tokens=SPECIAL, clock=time.process_time, now=datetime.now).render(
            MESSAGES
        )
    except TemplateError:
        got = None
    assert got == expected, source
