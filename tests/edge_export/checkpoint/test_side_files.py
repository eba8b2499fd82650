"""Small text files of a checkpoint: encodings, and flaws in what nobody needs."""

from __future__ import annotations

import pytest
from support.tiny_checkpoints import write_checkpoint

from edge_export.checkpoint.load import load_checkpoint
from edge_reasoner.errors import CheckpointError

BOM = b"\xef\xbb\xbf"
HARMLESS = {
    "BOM in config.json": ("config.json", lambda data: BOM + data),
    "BOM in tokenizer.json": ("tokenizer.json", lambda data: BOM + data),
    "BOM and CRLF in tokenizer_config.json": (
        "tokenizer_config.json",
        lambda data: BOM + data.replace(b", ", b",\r\n"),
    ),
    "BOM in the template": ("chat_template.jinja", lambda data: BOM + data),
    "Infinity that nobody reads": (
        "config.json",
        lambda data: data.replace(b"{", b'{"x": [0.0, Infinity],', 1),
    ),
    "nulls": (
        "config.json",
        lambda data: data.replace(b"{", b'{"mlp_bias": null, "max_window_layers": null,', 1),
    ),
    "NaN in generation_config.json": ("generation_config.json", lambda data: b'{"typical_p": NaN}'),
    "empty generation_config.json": ("generation_config.json", lambda data: b""),
    "UTF-16 special_tokens_map.json": ("special_tokens_map.json", lambda data: "{}".encode("utf-16")),
    "no end": ("generation_config.json", lambda data: b'{"eos_token_id": [1, null, -1]}'),
    "Latin-1 model card": ("README.md", lambda data: b"---\r\nlicense: mit\r\n---\r\nMod\xe8le"),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_flaws_that_nobody_needs_to_mend(case, tmp_path):
    """Byte order marks, and damage in what a model can do without, change nothing of what is loaded."""
    write_checkpoint(tmp_path)
    good = load_checkpoint(tmp_path)
    good_tokenizer = good.tokenizer
    name, edit = HARMLESS[case]
    path = tmp_path / name
    path.write_bytes(edit(path.read_bytes() if path.exists() else b""))
    checkpoint = load_checkpoint(tmp_path)
    assert checkpoint.config == good.config and checkpoint.chat_template == good.chat_template
    assert checkpoint.tokenizer.tokenizer_json == good_tokenizer.tokenizer_json
    assert checkpoint.licence == ("mit" if name == "README.md" else good.licence)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", '{"model_type": "llama", "\\ud800": 1}'),
        ("tokenizer_config.json", '{"chat_template": "\\ud800{{ messages }}"}'),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"410": {"content": "\\ud800"}}}'),
        ("added_tokens.json", '{"\\udfff": 410}'),
    ],
)
def test_lone_surrogates_are_refused(tmp_path, name, content):
    """JSON can spell what is no text; where it is read, it is one clear line."""
    write_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError) as caught:
        _ = load_checkpoint(tmp_path).tokenizer
    assert "\n" not in str(caught.value)
    str(caught.value).encode("utf-8")


def test_utf16_is_named(tmp_path):
    """A file that is needed and is UTF-16 says so."""
    write_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text(), encoding="utf-16")
    with pytest.raises(CheckpointError, match=r"config\.json: UTF-16 text, UTF-8 is needed"):
        load_checkpoint(tmp_path)
