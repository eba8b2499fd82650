"""Texts to calibrate and to measure on: the shipped ones, a user's files, and token batches."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_checkpoints import tokenizer
from tokenizers import Tokenizer, models

import edge_export
from edge_export.checkpoint.tokenizer_files import encode_texts, open_tokenizer
from edge_export.data.texts import TextSet, calibration_text, probe_text, read_text_set, to_token_batches
from edge_reasoner.errors import CheckpointError, InputError


def test_the_shipped_texts_are_two_different_ones():
    """What is measured on shares no line with what is calibrated on; digests are those of the files."""
    calibration, probe = calibration_text(), probe_text()
    lines = [{line for d in t.documents for line in d.splitlines() if line} for t in (calibration, probe)]
    assert not lines[0] & lines[1] and min(map(len, lines)) >= 10
    root = Path(edge_export.__file__).parent
    for text, file in ((calibration, "data/calibration.txt"), (probe, "data/probe.txt")):
        assert text.sha256 == hashlib.sha256((root / file).read_bytes()).hexdigest()
        assert len(text.documents) >= 3 and not any("-----" in d for d in text.documents)


def test_text_and_jsonl_files(tmp_path):
    """Documents of a .txt are separated by five hyphens; rows of a .jsonl are strings or text fields."""
    (tmp_path / "a.txt").write_text("one\ntwo\n-----\nthree ----- four\n", encoding="utf-8")
    assert read_text_set(tmp_path / "a.txt").documents == ("one\ntwo", "three ----- four")
    rows = ["plain", {"text": "x", "label": 1}, {"question": "q", "answer": "a"}, {"query": "q", "answer": 3}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    assert read_text_set(tmp_path / "b.jsonl").documents == ("plain", "x", "q\na", "q")


@given(st.binary(max_size=200), st.sampled_from([".txt", ".jsonl"]))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, data, suffix):
    """Whatever a file holds: documents, or an InputError of one line that names the file."""
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(data)
    try:
        assert any(document.strip() for document in read_text_set(path).documents)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_joined_files_and_half_characters(tmp_path):
    """A byte order mark within a .jsonl is skipped; half a character is refused."""
    (tmp_path / "joined.jsonl").write_bytes(b'"one"\r\n\xef\xbb\xbf"two"\n')
    assert read_text_set(tmp_path / "joined.jsonl").documents == ("one", "two")
    (tmp_path / "half.jsonl").write_text('"one"\n{"text": "\\ud800"}\n')
    with pytest.raises(InputError, match=r"half\.jsonl, line 2: a lone surrogate"):
        read_text_set(tmp_path / "half.jsonl")


def test_deep_json_is_refused(tmp_path):
    """A row nested beyond the parser's depth is bad input, not a crash."""
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"deep\.jsonl, line 1"):
        read_text_set(tmp_path / "deep.jsonl")


def test_token_batches_keep_their_bounds():
    """The prefix starts each document, lengths and their sum are bounded, single tokens are skipped."""
    texts = TextSet("t", ("the fox rests " * 50, "x", "the dog", "the quick brown fox " * 50), "0" * 64)
    batches = to_token_batches(texts, tokenizer(), [0], max_tokens=75, sequence_tokens=30)
    assert len(batches[0]) == 30 and sum(map(len, batches)) <= 75
    assert all(int(batch[0]) == 0 and 2 <= len(batch) <= 30 for batch in batches)
    plain = tokenizer().encode("the dog").ids
    assert any(batch.tolist() == [0, *plain] for batch in batches)
    with pytest.raises(InputError, match="no document of two tokens or more"):
        to_token_batches(TextSet("t", ("x", ""), ""), tokenizer(), [], max_tokens=9, sequence_tokens=9)


def test_a_tokenizer_that_fails_on_a_text():
    """What the library raises for a word without a token is one line that names the tokenizer."""
    broken = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"))
    text = TextSet("t", ("the fox",), "0" * 64)
    with pytest.raises(CheckpointError, match="t: not a usable tokenizer"):
        to_token_batches(text, broken, [], max_tokens=9, sequence_tokens=9)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a usable tokenizer"):
        encode_texts(broken.to_str().encode(), ["a", "the fox"], 9)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a usable tokenizer"):
        open_tokenizer(b"{}")
