"""Tokenizers of Hugging Face directories and SentencePiece models: against transformers and sentencepiece."""

from __future__ import annotations

import base64
import copy
import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer

from edge_export.checkpoint.tokenizer import limit_vocabulary, load_tokenizer_files
from edge_reasoner.errors import CheckpointError

GOLDEN = Path(__file__).parent / "golden"
TEXT = st.lists(
    st.one_of(st.text(max_size=15), st.sampled_from(["<|im_end|>", "  ", "\n\n", "12345"])), max_size=5
)


def golden(name):
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="ascii"))


def tokenizer_of(files):
    return Tokenizer.from_str(files.tokenizer_json.decode())


@pytest.fixture(scope="module")
def qwen_dir(tmp_path_factory):
    """A Qwen2 tokenizer saved by transformers."""
    metadata = golden("qwen2")["metadata"]
    vocab = {token: i for i, token in enumerate(metadata["ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["ggml.merges"]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", unk_token=None)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    path = tmp_path_factory.mktemp("qwen2")
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory):
    """A Llama tokenizer whose post-processor prepends <s>, saved by transformers."""
    content = json.loads(llama_json())
    tokenizer = LlamaTokenizer(
        vocab=content["model"]["vocab"],
        merges=[tuple(m) for m in content["model"]["merges"]],
        add_bos_token=True,
    )
    path = tmp_path_factory.mktemp("llama")
    tokenizer.save_pretrained(path)
    return path


def llama_json():
    """tokenizer.json of a tiny SentencePiece-like vocabulary."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "▁a",
        "ab",
        "▁ab",
    ]
    model = {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "byte_fallback": True}
    model["merges"] = [["▁", "a"], ["a", "b"], ["▁", "ab"], ["▁a", "b"]]
    model["unk_token"] = "<unk>"
    return json.dumps({"version": "1.0", "added_tokens": [], "model": model})


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXT.map("".join))
def test_qwen2_directory_agrees_with_transformers(qwen_dir, text):
    """Ids from the directory equal transformers', for any text."""
    reference = AutoTokenizer.from_pretrained(qwen_dir).encode(text)
    assert (
        tokenizer_of(load_tokenizer_files(qwen_dir)).encode(text, add_special_tokens=False).ids == reference
    )


def test_golden_of_llama_cpp_agrees_with_transformers(qwen_dir):
    """On the golden texts transformers' Qwen2 tokenizer and llama.cpp give the same ids (NFC, no markup)."""
    reference = AutoTokenizer.from_pretrained(qwen_dir)
    cases = [
        (text, ids)
        for text, ids in golden("qwen2")["cases"]
        if unicodedata.is_normalized("NFC", text) and "<" not in text
    ]
    assert len(cases) > 60
    assert [text for text, ids in cases if reference.encode(text) != ids] == []


def test_directory_facts(qwen_dir):
    """Template, ends and special tokens come from the side files; the bytes are canonical."""
    files = load_tokenizer_files(qwen_dir)
    assert files == load_tokenizer_files(qwen_dir)
    assert files.chat_template == "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert (files.add_bos, files.eos_token) == (False, "<|im_end|>")
    assert files.eos_token_ids[0] == tokenizer_of(files).token_to_id("<|im_end|>")


def test_bos_is_found_as_transformers_adds_it(llama_dir):
    """`add_bos` and the id say what transformers prepends; without special tokens the rest is the same."""
    files = load_tokenizer_files(llama_dir)
    expected = AutoTokenizer.from_pretrained(llama_dir).encode("ab a")
    assert (files.add_bos, files.bos_token, files.bos_token_id) == (True, "<s>", 1)
    assert [files.bos_token_id, *tokenizer_of(files).encode("ab a", add_special_tokens=False).ids] == expected
    assert files.eos_token_ids == (2,)


def write_directory(path, tokenizer=None, **side):
    """A tokenizer directory; `side` maps file stems to JSON values."""
    path.mkdir(exist_ok=True)
    (path / "tokenizer.json").write_text(tokenizer or llama_json(), encoding="utf-8")
    for name, value in side.items():
        (path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return path


def test_truncation_and_padding_are_switched_off(tmp_path):
    """A tokenizer.json that truncates or pads (MiniLM's pads to 128) does neither afterwards."""
    tokenizer = Tokenizer.from_str(llama_json())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=128)
    files = load_tokenizer_files(write_directory(tmp_path / "m", tokenizer.to_str()))
    assert len(tokenizer_of(files).encode("a" * 50).ids) == 50


def test_every_place_of_the_ends(tmp_path):
    """tokenizer_config decides the first end; generation_config, config and well-known names add theirs."""
    content = json.loads(llama_json())
    content["added_tokens"] = [
        {"id": 265, "content": "<|im_end|>", "special": True}
        | dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    ]
    side = {"tokenizer_config": {"eos_token": {"content": "</s>"}}, "config": {"eos_token_id": 261}}
    path = write_directory(
        tmp_path / "m", json.dumps(content), generation_config={"eos_token_id": [260, 2]}, **side
    )
    files = load_tokenizer_files(path)
    assert files.eos_token_ids == (2, 260, 261, 265)
    assert files.special_tokens == ("<|im_end|>",)


def test_chat_template_places(tmp_path):
    """A .jinja file wins; of several named templates the default is taken."""
    config = {"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}
    path = write_directory(tmp_path / "m", tokenizer_config=config)
    assert load_tokenizer_files(path).chat_template == "D"
    (path / "chat_template.jinja").write_text("J", encoding="utf-8")
    assert load_tokenizer_files(path).chat_template == "J"


def test_limit_vocabulary(tmp_path):
    """Added tokens beyond the embedding are dropped; ordinary tokens beyond it are an error."""
    content = json.loads(llama_json())
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    content["added_tokens"] = [{"id": 265, "content": "<image>", "special": True, **flags}]
    files = load_tokenizer_files(write_directory(tmp_path / "m", json.dumps(content)))
    assert files.vocab_size == 266
    limited = limit_vocabulary(files, 265)
    assert (limited.vocab_size, limited.special_tokens) == (265, ())
    assert max(tokenizer_of(limited).encode("<image>").ids) < 265
    assert limit_vocabulary(limited, 300) is limited
    with pytest.raises(CheckpointError, match="embeds only 200 tokens"):
        limit_vocabulary(files, 200)
    with pytest.raises(CheckpointError, match="embeds only 265 tokens"):
        limit_vocabulary(replace(files, eos_token_ids=(265,)), 265)


def test_sentencepiece_model_against_the_library(tmp_path):
    """A tokenizer.model encodes to the ids that the sentencepiece library gave for it."""
    record = golden("sentencepiece")
    (tmp_path / "tokenizer.model").write_bytes(base64.b64decode(record["model_base64"]))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}", encoding="utf-8")
    files = load_tokenizer_files(tmp_path)
    tokenizer = tokenizer_of(files)
    got = [(text, tokenizer.encode(text).ids) for text, _ in record["cases"]]
    assert len(got) > 100
    assert [
        text for (text, ids), (_, expected) in zip(got, record["cases"], strict=True) if ids != expected
    ] == []
    assert (files.add_bos, files.bos_token_id, files.eos_token_ids) == (True, 1, (2,))
    assert files.chat_template == "{{ bos_token }}"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_sentencepiece_model(tmp_path, data):
    """A damaged tokenizer.model gives a tokenizer or one CheckpointError."""
    model = bytearray(base64.b64decode(golden("sentencepiece")["model_base64"]))
    del model[data.draw(st.integers(0, len(model))) :]
    for _ in range(data.draw(st.integers(0, 3)) if model else 0):
        model[data.draw(st.integers(0, len(model) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "tokenizer.model").write_bytes(model)
    try:
        assert load_tokenizer_files(tmp_path).tokenizer_json
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_unigram_sentencepiece_is_refused(tmp_path):
    """A SentencePiece model that is not BPE is refused by kind."""
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x03\x0a\x01a")  # one piece, trainer settings left out
    with pytest.raises(CheckpointError, match="only SentencePiece BPE is supported"):
        load_tokenizer_files(tmp_path)


BAD_FILES = {
    "empty": (b"", "not a usable tokenizer"),
    "UTF-16": (b"\xff\xfe{\x00", "UTF-16 text, UTF-8 is needed"),
    "not UTF-8": (b"\xff{}", "not UTF-8 at byte 0"),
    "nested": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not a usable tokenizer"),
    "no model": (b'{"version":"1.0"}', "not a usable tokenizer"),
    "empty vocabulary": (
        b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{},"merges":[]}}',
        "empty",
    ),
    "huge id": (
        b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":4294967295},"merges":[]}}',
        "token id 4294967295; at most",
    ),
    "shared id": (
        b'{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":1,"b":1},"merges":[]}}',
        "two tokens share one id",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_tokenizer_json(case, tmp_path):
    """A tokenizer.json that is no tokenizer is refused in one line that names the file."""
    data, message = BAD_FILES[case]
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer_files(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / "tokenizer.json") in str(caught.value) and "\n" not in str(caught.value)


def test_oversized_tokenizer_json(tmp_path):
    """A tokenizer.json above the bound is refused before it is parsed."""
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(200 << 20)  # sparse
    with pytest.raises(CheckpointError, match="larger than the 100663296 bytes"):
        load_tokenizer_files(tmp_path)


BAD_SIDES = {
    "eos is no token": (
        {"tokenizer_config": {"eos_token": "<no>"}},
        "names the eos_token '<no>', which is not a token",
    ),
    "bos is a number": ({"special_tokens_map": {"bos_token": 5}}, "names the bos_token 5"),
    "end out of range": (
        {"generation_config": {"eos_token_id": 999}},
        "eos_token_id 999; token ids are 0 … 264",
    ),
    "end is a string": ({"config": {"eos_token_id": ["a"]}}, "eos_token_id 'a'"),
    "not an object": ({"tokenizer_config": [1]}, "must hold a JSON object"),
    "template is a number": ({"tokenizer_config": {"chat_template": 5}}, "chat_template must be a string"),
    "template is huge": (
        {"tokenizer_config": {"chat_template": "x" * (1 << 21)}},
        "chat template has 2097152 bytes",
    ),
}


@pytest.mark.parametrize("case", BAD_SIDES)
def test_bad_side_files(case, tmp_path):
    """Side files that contradict the tokenizer are refused in one line."""
    side, message = BAD_SIDES[case]
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer_files(write_directory(tmp_path / "m", **side))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    """A missing path and a directory without a tokenizer say what is needed."""
    with pytest.raises(CheckpointError, match="no such model"):
        load_tokenizer_files(tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json or tokenizer\.model; save one with"):
        load_tokenizer_files(tmp_path)


VALUES = st.sampled_from([None, -1, 2**32, "", "x", [], {}, True, "(", "[a", [["a", "b"]], {"a": 2**32 - 1}])


def _paths(value, here=()):
    """Every path into a JSON value, vocabulary entries left out."""
    yield here
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from _paths(child, (*here, key)) if key != "vocab" else ((*here, key),)


RICH = {
    **json.loads(llama_json()),
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a+"}, "behavior": "Isolated", "invert": False},
    "decoder": {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    "padding": {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    | {"pad_type_id": 0, "pad_token": "<unk>"},
}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_hostile_descriptions_never_escape(tmp_path, data):
    """Any part of tokenizer.json replaced by nonsense gives a tokenizer or one CheckpointError, no panic."""
    content = copy.deepcopy(RICH)
    for _ in range(data.draw(st.integers(1, 2))):
        *parents, last = data.draw(st.sampled_from(list(_paths(content))[1:]))
        target = content
        for key in parents:
            target = target[key]
        target[last] = copy.deepcopy(data.draw(VALUES))  # drawn twice, a list must not end up in itself
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    try:
        assert load_tokenizer_files(tmp_path).tokenizer_json
    except CheckpointError as error:
        assert "\n" not in str(error)
