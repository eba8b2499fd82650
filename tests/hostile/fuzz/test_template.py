"""Fuzzer of chat templates: rendered over every usual conversation, within the engine's bounds."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import pytest
from hostile.fuzz import composed
from hostile.fuzz.mutate import FEW, MANY, check
from support.tiny_checkpoints import TEMPLATE

from edge_reasoner.contract.template.trial import try_template

TEMPLATES = Path(__file__).resolve().parents[2] / "edge_reasoner" / "contract" / "template"

CHATML = """{%- if tools %}{{- tools | tojson(indent=2) }}{%- endif %}
{%- set ns = namespace(found=false, text='') -%}
{%- for message in messages -%}
  {%- if loop.first and message['role'] != 'system' -%}{{ '<|im_start|>system\\nBe brief' }}{%- endif -%}
  {%- set content = message.content -%}
  {%- if content is not string -%}
    {%- set content = content | map(attribute='text') | join(' ') -%}
  {%- endif -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\\n' ~ (content | trim) ~ '<|im_end|>' ~ '\\n' * 1 -}}
  {%- set ns.text = ns.text ~ content[:10] %}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
RULES = """{{ bos_token }}
{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}
{% macro turn(m, n=0) %}
  {% if m %}{{ '[INST] %s [/INST]' % m.content }}{% else %}{{ turn(m, n + 1) }}{% endif %}
{% endmacro %}
{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}{% endif %}
{% generation %}{{ turn(m) }}{% endgeneration %}{% if loop.last %}{% break %}{% endif %}{% endfor %}
{{ strftime_now('%Y-%m-%d') }}{{ [1, 2, 3] | sum }}{{ {'a': [1, 2.5, none]} | tojson }}{{ 2 ** 10 }}"""
WORDS = (
    *(b"{% for m in messages %}", b"{% endfor %}", b"{{ nobody(1e999) }}", b"1e999", b"range(1000000000)"),
    *(b"loop", b"self", b"super()", b"messages", b"namespace()", b"{% macro f() %}", b"{% include x %}"),
    *(b"|tojson", b"|join", b"|sort", b"|int", b"|float", b"* 1000000", b"** 99999", b"%*d", b".format"),
    *(
        b"__class__",
        b"|attr('__globals__')",
        b"strftime_now",
        b"raise_exception",
        b"{% set x = x %}",
        b"caller()",
    ),
    *(b"|list", b"|sum", b"|unique", b"|groupby('role')", b"|dictsort", b"|map('upper')", b"|reverse", b"|e"),
    *(b"|safe", b"|select('in', messages)", b"|indent(99, true)", b"|tojson(indent=9)", b"|format(a=1)"),
    *(b".split('')", b".rfind(x)", b".join(messages)", b".items()", b".upper()", b".get('a')", b"[::-1]"),
    *(b"{% set x = [x, x] %}", b"{% set x %}", b"{% endset %}", b"{% filter upper %}", b"{% call f() %}"),
    *(b"%(a)999999999d", b"%.999999999f", b" is even", b" is in(x)", b" == x", b" in x", b" ~ x ~ x"),
    *(b"loop(messages)", b"loop.changed(x)", b"recursive", b"f(*varargs)", b"f(**kwargs)", b"not ", b"-"),
)


def _seeds() -> list[bytes]:
    """The templates above, those of model families, and the snippets that show the whole language."""
    families = [path.read_bytes() for path in sorted((TEMPLATES / "templates").glob("*.jinja"))]
    snippets = [
        line
        for line in (TEMPLATES / "snippets.txt").read_bytes().splitlines()
        if b"nosuch" not in line and b"batch" not in line
    ]
    groups = [b"\n".join(snippets[start : start + 8]) for start in range(0, len(snippets), 8)]
    return [TEMPLATE.encode(), CHATML.encode(), RULES.encode(), *families, *groups]


def fuzz_template(data: bytes) -> None:
    """As the exporter tries a template, and the device renders it."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    try_template(
        data.decode("utf-8", "replace"), special_tokens=special, clock=time.monotonic, now=datetime.now
    )


def fuzz_composed_template(data: bytes) -> None:
    """A template of odd but well-formed statements and expressions."""
    fuzz_template(composed.template(data).encode())


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_fuzz_composed(count: int) -> None:
    """The same of templates that every parser takes."""
    check(fuzz_composed_template, [], count, damaged=(b"%d" % i for i in range(count)))


@pytest.mark.parametrize("count", [FEW, pytest.param(MANY, marks=pytest.mark.slow)])
def test_fuzz(count: int) -> None:
    """Only TemplateErrors, no hang, no growth."""
    check(fuzz_template, _seeds(), count, words=WORDS)
