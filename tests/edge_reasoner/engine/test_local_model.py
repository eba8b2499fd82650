"""The local chat model: what it feeds ahead of a chat's next turn."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime

import pytest
from support.local_models import TEMPLATE
from support.watched_model import echo, engine_of

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.contract.template.render import ChatTemplate
from edge_reasoner.engine.local_model import LocalModel
from edge_reasoner.errors import TemplateError

TRIMS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FORGETS = "{{ messages[-1].content }}"
CHAT = (
    {"role": "system", "content": "Be brief. " * 12},
    {"role": "user", "content": "How far is it? "},
    {"role": "assistant", "content": " 12 kilometres, or [the next words] "},
)


def _model(template: str | None, watched) -> LocalModel:
    made = None
    if template is not None:
        made = ChatTemplate(template, special_tokens={}, clock=lambda: 0.0, now=datetime.now)
    return LocalModel(engine_of(watched), made, bos_token_id=None)


@pytest.mark.parametrize("template", [TEMPLATE, TRIMS, None])
@pytest.mark.parametrize("words", ["And back?", "  ", "[the next words]"])
def test_the_next_turn_finds_what_was_fed_ahead(template: str | None, words: str) -> None:
    """Whatever the user says next, all whole chunks of what comes before it are cached, and nothing else."""
    watched = echo()
    with closing(_model(template, watched)) as model:
        model.submit(ChatRequest(({"role": "user", "content": "x"},))).result()
        before = len(watched.fed)
        with watched.held():
            model.prefill_ahead(CHAT)
            watched.arrive()
            watched.step(2)
        done = model.submit(ChatRequest((*CHAT, {"role": "user", "content": words}))).result()
        assert done.usage is not None and done.usage.cached_tokens == 128
        assert [len(tokens) for _, tokens in watched.fed[before : before + 3]] == [32, 32, 64]


@pytest.mark.parametrize("template", [FORGETS, "{{ raise_exception('no') }}", TemplateError("broken")])
def test_what_cannot_be_known_is_left_alone(template: str | TemplateError) -> None:
    """A template that refuses the chat, or that does not keep its beginning, feeds nothing ahead."""
    watched = echo()
    if isinstance(template, TemplateError):
        model = LocalModel(engine_of(watched), template, bos_token_id=None)
    else:
        model = _model(template, watched)
    with closing(model):
        model.submit(ChatRequest(text="x")).result()
        before = len(watched.fed)
        model.prefill_ahead(CHAT)
        model.submit(ChatRequest(text="y")).result()
        assert all(len(tokens) == 1 for _, tokens in watched.fed[before:])
