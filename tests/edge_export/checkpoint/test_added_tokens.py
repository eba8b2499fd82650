"""Added tokens: whichever file speaks of one, it keeps its id and stays one piece, or is refused."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from edge_export.checkpoint.tokenizer import limit_vocabulary, load_tokenizer_files
from edge_reasoner.errors import CheckpointError

GOLDEN = Path(__file__).parent / "golden" / "sentencepiece.json"
FLAGS = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized", "special"], False)


def byte_level(added=()):
    """A tokenizer.json of 256 bytes; `added` are entries of its added_tokens, ids and all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [{**FLAGS, **entry} for entry in added]
    return content


def write(path, tokenizer, **side):
    """A directory with a tokenizer.json (or, from bytes, a tokenizer.model) and JSON side files."""
    path.mkdir(exist_ok=True)
    if isinstance(tokenizer, bytes):
        (path / "tokenizer.model").write_bytes(tokenizer)
    else:
        (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, value in side.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def loaded(path):
    files = load_tokenizer_files(path)
    return files, Tokenizer.from_str(files.tokenizer_json.decode())


def ids(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_tokens_beside_a_sentencepiece_model(tmp_path):
    """added_tokens.json and added_tokens_decoder add tokens after the pieces, with a gap if they say so."""
    data = base64.b64decode(json.loads(GOLDEN.read_text(encoding="ascii"))["model_base64"])
    size = load_tokenizer_files(write(tmp_path / "plain", data)).vocab_size
    decoder = {str(size + 1): {"content": "<|im_end|>", "special": True}}
    config = {"added_tokens_decoder": decoder, "eos_token": "<|im_end|>", "add_bos_token": False}
    path = write(tmp_path / "m", data, added_tokens={"<tool>": size + 9}, tokenizer_config=config)
    files, tokenizer = loaded(path)
    assert ids(tokenizer, "<|im_end|>") == [size + 1] and ids(tokenizer, "<tool>") == [size + 9]
    assert tokenizer.decode([size + 9]) == "<tool>"
    assert ids(tokenizer, "a<tool>b").count(size + 9) == 1
    assert (files.eos_token_ids[0], files.add_bos, files.vocab_size) == (size + 1, False, size + 10)
    assert (files.bos_token, files.special_tokens[-1]) == ("<s>", "<|im_end|>")


def test_a_gap_before_an_added_token(tmp_path):
    """The library would renumber a token behind a gap; here it keeps the id that its weights have."""
    content = byte_level([{"id": 256, "content": "<a>"}, {"id": 300, "content": "<b>"}])
    assert ids(Tokenizer.from_str(json.dumps(content)), "<b>") == [257]
    _, tokenizer = loaded(write(tmp_path / "m", content))
    assert (ids(tokenizer, "<a>"), ids(tokenizer, "<b>")) == ([256], [300])


def test_side_files_add_to_a_tokenizer_json(tmp_path):
    """A token that only a side file lists is added; an ordinary token that it lists becomes one piece."""
    side = {
        "added_tokens": {"<x>": 256},
        "tokenizer_config": {"added_tokens_decoder": {"257": {"content": "<y>"}}},
    }
    _, tokenizer = loaded(write(tmp_path / "m", byte_level(), **side))
    assert (ids(tokenizer, "<x>"), ids(tokenizer, "<y>")) == ([256], [257])


def test_a_normalizer_does_not_break_added_tokens(tmp_path):
    """A token that the normalizer would change (here: lowercase) is looked for in the raw text."""
    content = byte_level([{"id": 256, "content": "<TOOL>"}])
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.normalizer = normalizers.Lowercase()
    _, tokenizer = loaded(write(tmp_path / "m", json.loads(tokenizer.to_str())))
    assert ids(tokenizer, "<TOOL>") == [256]


CONTRADICTIONS = {
    "one id, two texts": ({"added_tokens": {"<a>": 256, "<b>": 256}}, "two added tokens have the id 256"),
    "one text, two ids": (
        {
            "added_tokens": {"<a>": 256},
            "tokenizer_config": {"added_tokens_decoder": {"257": {"content": "<a>"}}},
        },
        "'<a>' has two ids, 257 and 256",
    ),
    "id of a piece": ({"added_tokens": {"<a>": 5}}, "'<a>' has the id 5, which belongs to the token '&'"),
    "other id than the vocabulary's": (
        {"added_tokens": {"&": 300}},
        "'&' has the id 300, but the vocabulary",
    ),
    "negative": ({"added_tokens": {"<a>": -1}}, "'<a>' has the id -1; allowed is 0"),
    "huge": ({"added_tokens": {"<a>": 1 << 40}}, "allowed is 0 to"),
    "no number": ({"added_tokens": {"<a>": "x"}}, "'<a>' has the id 'x'"),
    "no text": ({"added_tokens": {"": 256}}, "the added token 256 must have 1 to"),
    "no object": ({"tokenizer_config": {"added_tokens_decoder": [1]}}, "must be an object"),
    "odd entry": (
        {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}},
        "malformed entry 'x'",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused(case, tmp_path):
    """Entries that contradict each other or the vocabulary are one clear line."""
    side, message = CONTRADICTIONS[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        load_tokenizer_files(write(tmp_path / "m", byte_level(), **side))
    assert "\n" not in str(caught.value)


def test_tokens_beyond_the_embedding(tmp_path):
    """They are left out with a warning, and refused where the chat template writes them."""
    content = byte_level([{"id": 256, "content": "<a>"}, {"id": 300, "content": "<image>"}])
    files = load_tokenizer_files(write(tmp_path / "m", content))
    limited = limit_vocabulary(files, 272)
    assert limited.vocab_size == 257 and "1 added tokens lie beyond the 272 tokens" in limited.warnings[0]
    (tmp_path / "m" / "chat_template.jinja").write_text("{{ messages }}<image>")
    with pytest.raises(CheckpointError, match="the chat template writes the added token '<image>'"):
        limit_vocabulary(load_tokenizer_files(tmp_path / "m"), 272)


def test_roles_that_nobody_needs(tmp_path):
    """A padding or unknown token that is none is a warning, as is a BOS where none is added."""
    config = {
        "pad_token": "[PAD]",
        "unk_token": {"content": "<unk>"},
        "bos_token": "<s>",
        "add_bos_token": False,
    }
    files = load_tokenizer_files(write(tmp_path / "m", byte_level(), tokenizer_config=config))
    assert (files.pad_token, files.unk_token, files.bos_token, files.add_bos) == (None, None, None, False)
    assert [warning.count("which is not a token") for warning in files.warnings] == [1, 1, 1]


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ({"tokenizer_config": {"additional_special_tokens": ["<zz>"]}}, "read as plain text: '<zz>'"),
        ({"tokenizer_config": {"extra_special_tokens": {"image_token": "<zz>"}}}, "plain text: '<zz>'"),
        ({"special_tokens_map": {"additional_special_tokens": [{"content": "<zz>"}]}}, "plain text: '<zz>'"),
        ({"tokenizer_config": {"add_bos_token": True}}, "there is no bos_token; none is added"),
        ({"tokenizer_config": {"add_bos_token": "false"}}, "add_bos_token .* is 'false', not true or false"),
    ],
)
def test_what_side_files_name_in_vain(side, message, tmp_path):
    """Special tokens that no vocabulary has, and a BOS that cannot be added, are warnings."""
    (warning,) = load_tokenizer_files(write(tmp_path / "m", byte_level(), **side)).warnings
    assert re.search(message, warning)


def test_merges_left_out_at_random(tmp_path):
    """A tokenizer saved with BPE dropout encodes the same text to the same ids, every time."""
    content = byte_level()
    content["model"]["vocab"]["he"] = 256
    content["model"] |= {"merges": ["h e"], "dropout": 0.9}
    _, tokenizer = loaded(write(tmp_path / "m", content))
    assert ids(tokenizer, "he" * 40) == [256] * 40
