"""A chat template is tried over the usual conversations, with the engine that will render it."""

from __future__ import annotations

import time
from datetime import datetime

import pytest

from edge_reasoner.contract.template.trial import SHAPES, SINGLE_TURN, try_template
from edge_reasoner.errors import TemplateError

GOOD = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"


def tried(source):
    return try_template(source, special_tokens={"bos_token": "<s>"}, clock=time.monotonic, now=datetime.now)


def test_an_ordinary_template_takes_everything():
    """Nothing fails, is refused or lost."""
    trial = tried(GOOD + "{% if add_generation_prompt %}<assistant>{% endif %}")
    assert (dict(trial.failed), dict(trial.refused), trial.lost) == ({}, {}, ())


def test_what_a_template_refuses_is_no_fault():
    """Gemma's raise_exception on a system message is told apart from a fault."""
    rule = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    )
    trial = tried(rule + GOOD)
    assert dict(trial.failed) == {}
    assert set(trial.refused) == {name for name in SHAPES if "system message" in name}


def test_faults_are_named_by_shape():
    """A fault on the second turn alone leaves single questions usable."""
    trial = tried("{% if messages|length > 2 %}{{ nobody('x') }}{% endif %}" + GOOD)
    assert SINGLE_TURN not in trial.failed and "'nobody' is undefined" in trial.failed["a second question"]


def test_lost_texts():
    """A template that drops the system message is found out."""
    trial = tried("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    assert "a system message" in trial.lost and SINGLE_TURN not in trial.lost


@pytest.mark.parametrize(
    "source",
    [
        "{% for m in messages %}",
        "{{ 1 | nosuchfilter }}",
        "{{ nobody(1e999) }}",
        "{{ 1e999 }}",
        "{% include 'x' %}{% import 'y' as z %}{{ z }",
    ],
)
def test_templates_that_do_not_compile(source):
    """They are one TemplateError, whatever Python would have raised."""
    with pytest.raises(TemplateError) as caught:
        tried(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ nobody(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include 'x' %}",
        "{{ ['a', 1] | sort }}",
        "{{ namespace() }}",
        "{{ strftime_now('%' * 101) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '%*d' % (10**9, 1) }}",
        "{{ self.nothing() }}{{ super() }}",
    ],
)
def test_templates_that_fail_when_rendered(source):
    """Each shape fails with one line; nothing else leaves the engine."""
    trial = tried(source)
    assert set(trial.failed) == set(SHAPES)
    assert all("\n" not in problem for problem in trial.failed.values())
