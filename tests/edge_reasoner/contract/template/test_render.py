"""Chat templates: the same text as transformers on public templates; hostile ones end in one clear line."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest

from edge_reasoner.contract.template.render import MAX_TEMPLATE_BYTES, ChatTemplate
from edge_reasoner.errors import TemplateError

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHATS = {
    "one": [{"role": "user", "content": "Was ist  <|im_end|> 2+2?\n"}],
    "system": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "你好"}],
    "turns": [
        {"role": "user", "content": "a & <b>"},
        {"role": "assistant", "content": " \"c\" 'd' "},
        {"role": "user", "content": "e {{ 7*7 }}"},
    ],
}
TOOLS = [{"type": "function", "function": {"name": "sum", "parameters": {"é": [1, 2.5, None, "<x>"]}}}]
BOMBS = {
    "string product": "{{ 'a' * 10**9 }}",
    "huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "slow loop": "{% set a = 'x'*1000000 %}{% for i in range(90000) %}{% set b = a[1:] %}{% endfor %}",
    "recursive loop": "{% for i in range(999) recursive %}{{ loop(range(999)) if loop.depth<3 }}{% endfor %}",
    "macro that never ends": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "wide filter": "{{ 'a'|center(10**9) }}",
    "wide method": "{{ 'a'.ljust(10**9) }}",
    "wide percent": "{{ '%999999999d' % 1 }}",
    "wide percent filter": "{{ '%*d'|format(999999999, 1) }}",
    "wide str.format": "{{ '{:>999999999}'.format('a') }}",
    "power": "{{ 2**(4000**2) }}",
    "wide indent": "{{ ('a\n'*10000)|indent(10**9) }}",
    "static text": "{% set x %}{% for i in range(90000) %}" + "a" * 50_000 + "{% endfor %}{% endset %}",
    "namespace cycle": "{% set ns=namespace() %}{% set ns.a=ns %}{{ ns }}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "dunder call": "{{ messages.__len__() }}",
    "mutation": "{% set _ = messages.append(1) %}",
    "file": "{% include '/etc/passwd' %}",
    "syntax": "{% for %}",
    "deep expression": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "date format": "{{ strftime_now('%d' * 200) }}",
    "too large": "a" * (MAX_TEMPLATE_BYTES + 1),
}
DOUBLINGS = {
    "~": "ns.x ~ ns.x",
    "+": "ns.x + ns.x",
    "list": "[ns.x, ns.x]",
    "tuple": "(ns.x, ns.x)",
    "dict": "{'a': ns.x, 'b': ns.x}",
    "dict()": "dict(a=ns.x, b=ns.x)",
    "join": "['ab', ns.x, ns.x]|join",
    "str.join": "'ab'.join([ns.x ~ '', ns.x ~ ''])",
    "replace": "(ns.x ~ 'aa')|replace('a', ns.x)",
    "str.replace": "(ns.x ~ 'aa').replace('a', ns.x)",
    "map": "(['aa' ~ ns.x]|map('replace', 'a', ns.x)|list)[0]",
    "format": "'%s%s' % (ns.x, ns.x)",
}


def _template(source: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens=SPECIAL, clock=time.monotonic, now=datetime.now)


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", [p.stem for p in sorted(TEMPLATES.glob("*.jinja"))])
@pytest.mark.parametrize("generation", [True, False])
def test_public_templates_as_transformers(name: str, chat: str, generation: bool) -> None:
    """Public templates give the text that transformers gives, with and without a system turn."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (TEMPLATES / f"{name}.jinja").read_text("utf-8")
    expected, _ = utils.render_jinja_template(
        [CHATS[chat]], chat_template=source, add_generation_prompt=generation, **SPECIAL
    )
    assert _template(source).render(CHATS[chat], add_generation_prompt=generation) == expected[0]


def test_tools_as_transformers() -> None:
    """The tojson filter writes tools as transformers' does (no HTML escaping, no ASCII escaping)."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (TEMPLATES / "qwen2.5.jinja").read_text("utf-8")
    expected, _ = utils.render_jinja_template([CHATS["one"]], tools=TOOLS, chat_template=source)
    got = _template(source).render(CHATS["one"], add_generation_prompt=False, variables={"tools": TOOLS})
    assert got == expected[0]


@pytest.mark.parametrize("bomb", BOMBS)
def test_hostile_template_is_one_clear_line(bomb: str) -> None:
    """Each way to exhaust time or memory, or to leave the sandbox, ends in TemplateError within seconds."""
    start_s = time.process_time()
    with pytest.raises(TemplateError) as caught:
        _template(BOMBS[bomb]).render(CHATS["one"])
    assert "\n" not in str(caught.value) and str(caught.value).startswith("chat template")
    assert time.process_time() - start_s < 6


@pytest.mark.parametrize("operation", DOUBLINGS)
@pytest.mark.parametrize(
    "use", ["{{ ns.x }}", "{{ ns.x|tojson }}", "{{ ns.x == 1 }}", "{{ ns.x|string|length }}"]
)
def test_doubling_runs_out_of_budget(operation: str, use: str) -> None:
    """A value that doubles sixty times is refused, whatever doubles it and however it is used."""
    source = (
        "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = "
        + DOUBLINGS[operation]
        + " %}{% endfor %}"
        + use
    )
    with pytest.raises(TemplateError):
        _template(source).render(CHATS["one"])


def test_template_refuses_a_role_in_its_own_words() -> None:
    """raise_exception's text reaches the user as one line."""
    source = (TEMPLATES / "gemma3.jinja").read_text("utf-8")
    with pytest.raises(TemplateError, match="roles must alternate"):
        _template(source).render([{"role": "assistant", "content": "x"}])


def test_strftime_uses_the_injected_clock() -> None:
    """`strftime_now` shows the injected date."""
    template = ChatTemplate(
        "{{ strftime_now('%d %b %Y') }}",
        special_tokens={},
        clock=time.monotonic,
        now=lambda: datetime(2024, 7, 26),
    )
    assert template.render([]) == "26 Jul 2024"


def test_budget_is_renewed() -> None:
    """A template that is fine once is fine many times."""
    template = _template("{% for i in range(60000) %}{% endfor %}ok")
    assert [template.render([]) for _ in range(4)] == ["ok"] * 4
