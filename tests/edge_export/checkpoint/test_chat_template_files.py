"""The chat template of a directory is found wherever transformers knows it, or its absence is named."""

from __future__ import annotations

import json

import pytest
from support.tiny_checkpoints import TEMPLATE, write_checkpoint

from edge_export.checkpoint.chat_template_files import find_chat_template
from edge_export.checkpoint.load import load_checkpoint
from edge_reasoner.errors import CheckpointError

NAMED = {"name": "default", "template": TEMPLATE}
TOOLS = {"name": "tool_use", "template": "{{ tools }}"}


def config(value):
    """Writes `chat_template` into tokenizer_config.json."""
    return {"tokenizer_config.json": json.dumps({"chat_template": value})}


def folder(path, files):
    """A directory with those files."""
    for name, text in files.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


@pytest.mark.parametrize(
    "files",
    [
        {"chat_template.jinja": TEMPLATE, **config("{{ older }}")},
        config(TEMPLATE),
        config([TOOLS, NAMED]),
        config({"default": TEMPLATE, "rag": "{% if"}),
        config([NAMED, {"name": "rag", "template": None}]),
        {"chat_template.json": json.dumps({"chat_template": TEMPLATE})},
        {"chat_template.json": json.dumps({"chat_template": {"default": TEMPLATE}})},
        {"chat_template.jinja": " \n", **config(TEMPLATE)},
        {"additional_chat_templates/default.jinja": TEMPLATE},
        {"chat_template.jinja": TEMPLATE, "additional_chat_templates/rag.jinja": "{% if"},
    ],
)
def test_found(files, tmp_path):
    """One text, several by name, as a list or an object, in either file."""
    assert find_chat_template(folder(tmp_path, files)).text == TEMPLATE


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (config([TOOLS]), "named 'tool_use', none of them 'default'"),
        (config({"rag": "x", "tool_use": "y"}), "named 'rag', 'tool_use'"),
        ({"additional_chat_templates/rag.jinja": "x"}, "named 'rag', none of them"),
        (config(" \n"), "chat_template is empty"),
        ({"chat_template.jinja": ""}, "empty; it is left aside"),
    ],
)
def test_none_where_one_might_be_expected(files, message, tmp_path):
    """Templates without a default, and an empty one, are no template; the report says so."""
    found = find_chat_template(folder(tmp_path, files))
    assert found.text is None and message in found.warnings[0]


def test_none_at_all(tmp_path):
    """A base model is no fault."""
    assert find_chat_template(tmp_path).warnings == ()


@pytest.mark.parametrize("value", [3, ["x"], {"default": 3}])
def test_what_is_no_template_is_refused(value, tmp_path):
    """Neither a text nor named texts."""
    with pytest.raises(CheckpointError, match="chat_template must be a string, not"):
        find_chat_template(folder(tmp_path, config(value)))


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "tokenizer_config.json", "added_tokens.json", "tokenizer.json"]
)
def test_links_to_nothing_are_not_left_out(name, tmp_path):
    """An interrupted download leaves links without their files: that is not the same as no such file."""
    write_checkpoint(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=f"{name}: cannot be read: No such file"):
        _ = load_checkpoint(tmp_path).tokenizer


def test_a_dispensable_link_to_nothing_is_a_warning(tmp_path):
    """generation_config.json, which a model can do without."""
    write_checkpoint(tmp_path)
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    (tmp_path / "generation_config.json").symlink_to("nowhere")
    assert any(
        "generation_config.json: cannot be read" in w for w in load_checkpoint(tmp_path).tokenizer.warnings
    )
