"""The exporter tries a chat template as the device would use it."""

from __future__ import annotations

import pytest
from support.tiny_checkpoints import TEMPLATE, write_checkpoint

from edge_export.checkpoint.chat_template import check_chat_template_works
from edge_export.checkpoint.tokenizer import load_tokenizer_files
from edge_reasoner.errors import CheckpointError


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The files of a tiny tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder)
    return load_tokenizer_files(folder)


def test_a_good_template_gives_no_warning(tokenizer):
    """The template of the tiny checkpoint works."""
    assert check_chat_template_works(TEMPLATE, tokenizer, "m") == ()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (TEMPLATE + "{% if x %}", "chat template, line 1: Unexpected end of template"),
        (TEMPLATE + "{{ 3.1 | nosuch }}", "No filter named 'nosuch'"),
        ("{{ '{}'.format(messages) }}" + TEMPLATE, "str.format is not available"),
        ("{{ raise_exception('never') }}", "chat template: never"),
        ("{{ bos_token }}", "leaves out the user's message"),
    ],
)
def test_an_unusable_template_is_refused(tokenizer, template, message):
    """One line names the fault, the consequence and the remedy."""
    with pytest.raises(CheckpointError, match=message) as caught:
        check_chat_template_works(template, tokenizer, "the model")
    assert "the device could not use" in str(caught.value) and "\n" not in str(caught.value)


def test_shapes_that_fail_are_warnings(tokenizer):
    """A template without system messages, or with a fault on later turns, is used and reported."""
    strict = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    broken = "{% if messages|length > 2 %}{{ nobody() }}{% endif %}"
    warnings = check_chat_template_works(strict + broken + TEMPLATE, tokenizer, "m")
    assert any(
        "takes no conversation with a system message (chat template: no system)" in w for w in warnings
    )
    assert any("'nobody' is undefined: the device refuses conversations with a second" in w for w in warnings)


@pytest.mark.parametrize("marker", ["<|im_start|>", "<start_of_turn>", "<｜User｜>"])
def test_markers_that_are_no_tokens_are_a_warning(tokenizer, marker):
    """A template of another model's markers: they would be read as plain text."""
    warnings = check_chat_template_works(f"{marker}{TEMPLATE}", tokenizer, "m")
    assert len(warnings) == 1 and f"writes '{marker}', which is no token" in warnings[0]


def test_markers_that_are_tokens_are_none(tokenizer):
    """<|im_end|> is a token of the tiny tokenizer; what only looks like a marker is none."""
    assert check_chat_template_works(f"<|im_end|>a < b |> c{TEMPLATE}", tokenizer, "m") == ()
