"""Tokenizers that cost time or memory, or panic: refused in one line, or used within bounds."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import pytest
from support.tiny_tokenizers import byte_level, sentencepiece

from edge_export.checkpoint.tokenizer_files import canonical_json, parse_tokenizer
from edge_reasoner.contract.bundle.tokenizer_check import with_model_type
from edge_reasoner.contract.bundle.tokenizer_files import TokenizerConfig
from edge_reasoner.contract.bundle.tokenizer_patterns import KNOWN_PATTERNS, is_accepted
from edge_reasoner.engine.tokens import IncrementalDecoder, TextTokenizer
from edge_reasoner.errors import BundleError, CheckpointError, EdgeReasonerError, InputError

MAX_CPU_S = 4.0
MAX_GROWTH_BYTES = 400 << 20
BASE = json.loads(byte_level().to_str())
VOCAB = BASE["model"]["vocab"]
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
WORDPIECE = {
    "type": "WordPiece",
    "unk_token": "[UNK]",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 100,
    "vocab": {"[UNK]": 0, "a": 1, "##a": 2},
}
UNIGRAM = {
    "type": "Unigram",
    "unk_id": 0,
    "vocab": [["<unk>", 0.0], ["a", -1.0]],
    "byte_fallback": False,
}
TEXT_PIECE = {"Sequence": {"id": "A", "type_id": 0}}
PAIR = [TEXT_PIECE, {"Sequence": {"id": "B", "type_id": 0}}]
SPECIAL_PIECE = {"SpecialToken": {"id": "x", "type_id": 0}}


def replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def replace_expression(expression: str, new: str = "") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": expression}, "content": new}


def split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def steps(*normalizers: dict[str, Any]) -> dict[str, Any]:
    return {"normalizer": {"type": "Sequence", "normalizers": list(normalizers)}}


def model(**changed: Any) -> dict[str, Any]:
    return {"model": {**BASE["model"], **changed}}


def added(*tokens: dict[str, Any]) -> dict[str, Any]:
    return {"added_tokens": [{"id": 500, "content": "<x>", **FLAGS, **token} for token in tokens]}


def template(single: list[Any], ids: list[int], tokens: list[str]) -> dict[str, Any]:
    special = {"x": {"id": "x", "ids": ids, "tokens": tokens}}
    return {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": single,
            "pair": PAIR,
            "special_tokens": special,
        }
    }


#: what is changed of a sound tokenizer.json, and a text
ATTACKS: dict[str, tuple[dict[str, Any], str]] = {
    "chain of replacements": (steps(*[replace("a", "a" * 60)] * 5), "a" * 1000),
    "doubling": (steps(*[replace("a", "aa")] * 30), "a"),
    "nested chains": (steps(*[steps(*[replace("a", "aaaa")] * 4)["normalizer"]] * 4), "a"),
    "chain of expressions": (steps(*[replace_expression(".", "x" * 64)] * 5), "a" * 100),
    "long replacement": ({"normalizer": replace("a", "x" * 10_000_000)}, "a" * 100),
    "replacement of nothing": ({"normalizer": replace("", "x")}, "abc"),
    "long prefix": ({"normalizer": {"type": "Prepend", "prepend": "x" * 50_000_000}}, "a"),
    "chain of decompositions": (steps(*[{"type": "NFKD"}] * 20), "\ufdfa" * 20_000),
    "exponential split": ({"pre_tokenizer": split("(a+)+$")}, "a" * 40 + "!"),
    "quadratic split": ({"pre_tokenizer": split("a+b")}, "a" * 300_000),
    "quadratic digits": ({"pre_tokenizer": split(r"\d{1,3}(?=(?:\d{3})*\b)")}, "1" * 300_000),
    "exponential normalizer": ({"normalizer": replace_expression("(a|a)*$")}, "a" * 40 + "!"),
    "exponential decoder": ({"decoder": replace_expression("(.+)+$x")}, "a" * 40 + "!"),
    "growing decoder": (
        {"decoder": {"type": "Sequence", "decoders": [replace("a", "a" * 60)] * 5}},
        "a" * 10,
    ),
    "strips more than there is": (
        {"decoder": {"type": "Strip", "content": "x", "start": 5, "stop": 5}},
        "xx",
    ),
    "strips endlessly": (
        {"decoder": {"type": "Strip", "content": " ", "start": 1 << 60, "stop": 1 << 60}},
        "a b",
    ),
    "pieces of no length": ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "abc"),
    "template of many texts": (template([TEXT_PIECE] * 5000, [1], ["x"]), "a" * 10_000),
    "template of many tokens": (
        template([SPECIAL_PIECE, TEXT_PIECE], [7] * 1_000_000, ["x"] * 1_000_000),
        "a",
    ),
    "template of unequal lists": (template([SPECIAL_PIECE, TEXT_PIECE], [1, 2, 3], ["x"]), "a"),
    "template of a huge id": (template([SPECIAL_PIECE, TEXT_PIECE], [4_000_000_000], ["x"]), "a"),
    "merges of no tokens": (model(merges=[["q", "nope"]]), "a"),
    "merges of many parts": (model(merges=["a b c d"]), "a"),
    "prefix inside of a character": (model(continuing_subword_prefix="é"), "the fox"),
    "prefix longer than tokens": (model(continuing_subword_prefix="x" * 60), "the fox"),
    "huge id": (model(vocab={**VOCAB, "zz": 4_294_967_295}), "zz"),
    "odd dropout": (model(dropout=7.5), "the fox"),
    "unknown unknown token": (model(vocab={"a": 0}, merges=[], unk_token="<no>"), "größe"),
    "long added token": (added({"content": "x" * 30_000_000}), "x"),
    "many added tokens": (added(*[{"id": 500 + i, "content": f"<{i}>"} for i in range(200_000)]), "<5>"),
    "empty added token": (added({"content": ""}), "abc"),
    "added token between spaces": (added({"content": "q", "lstrip": True, "rstrip": True}), "q " * 40_000),
    "added token in words": (added({"content": "q", "single_word": True}), "qa" * 100_000),
    "long words": (
        {"model": {**WORDPIECE, "max_input_chars_per_word": 10**9}, "pre_tokenizer": None},
        "a" * 20_000,
    ),
    "no unknown word": ({"model": {**WORDPIECE, "unk_token": "nope"}}, "zzz"),
    "scores beyond numbers": (
        {"model": {**UNIGRAM, "vocab": [["<unk>", 0.0], ["a", 1e308], ["aa", 1e308]]}},
        "aaaa",
    ),
    "unknown token beyond the list": ({"model": {**UNIGRAM, "unk_id": 99}}, "zzz"),
    "no unknown token": ({"model": {**UNIGRAM, "unk_id": None}}, "zzz"),
    "byte fallback without bytes": ({"model": {**UNIGRAM, "byte_fallback": True}}, "zzz"),
    "no token at all": ({"model": {**UNIGRAM, "vocab": []}}, "zzz"),
    "an empty token": ({"model": {**UNIGRAM, "vocab": [["<unk>", 0.0], ["", -1.0]]}}, "zzz"),
    "a token of every length": (
        {"model": {**UNIGRAM, "vocab": [["<unk>", 0.0], *(["a" * i, -1.0] for i in range(1, 3000))]}},
        "a" * 30_000,
    ),
    "no character map": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "abc"),
    "odd character map": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "CAAAAP////////8A"}},
        "abc",
    ),
    "growing character map": (
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAA" + "YWFh" * 90_000 + "AAA="}},
        "abc",
    ),
    "odd space": (
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁▁", "prepend_scheme": "always"}},
        "a",
    ),
    "unknown part": (
        {"decoder": {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}},
        "a",
    ),
    "padding": ({"padding": {"strategy": {"Fixed": 400_000_000}, "direction": "Right"}}, "a"),
    "truncation": ({"truncation": {"direction": "Right", "max_length": 5, "stride": 100}}, "abc"),
}


def _peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _opened(changed: dict[str, Any], **options: Any) -> TextTokenizer:
    data = json.dumps({**BASE, **changed}).encode()
    return TextTokenizer.from_files(data, TokenizerConfig(), where="tokenizer.json", **options)


@pytest.mark.parametrize("attack", ATTACKS)
def test_costs_are_bounded(attack: str) -> None:
    """Opened, encoded and decoded, or refused in one line of ours, with little time and memory."""
    changed, text = ATTACKS[attack]
    before_bytes, start_s = _peak_bytes(), time.process_time()
    try:
        tokenizer = _opened(changed)
        tokenizer.decode(tokenizer.encode(text, add_special=True))
    except EdgeReasonerError as error:
        assert str(error) and "\n" not in str(error)
    assert time.process_time() - start_s < MAX_CPU_S
    assert _peak_bytes() - before_bytes < MAX_GROWTH_BYTES


@pytest.mark.parametrize("attack", ATTACKS)
def test_the_exporter_makes_nothing_that_the_device_refuses(attack: str) -> None:
    """What the exporter takes, the device opens; the rest it names."""
    data = json.dumps({**BASE, **ATTACKS[attack][0]})
    try:
        made = canonical_json(parse_tokenizer(data, "m/tokenizer.json"), "m/tokenizer.json")
    except CheckpointError as error:
        assert str(error).startswith("m/tokenizer.json: ") and "\n" not in str(error)
        return
    TextTokenizer.from_files(made, TokenizerConfig(), where="tokenizer.json").encode("a b")


def test_a_part_twice_is_what_was_checked() -> None:
    """A key that stands twice cannot mean one thing to the check and another to the library."""
    harmless = '"normalizer": {"type": "NFC"}, "normalizer": {"type": "Lowercase"}'
    data = json.dumps({**BASE, "normalizer": "here"}).replace('"normalizer": "here"', harmless)
    tokenizer = TextTokenizer.from_files(data.encode(), TokenizerConfig(), where="tokenizer.json")
    assert tokenizer.decode(tokenizer.encode("ABC")) == "abc"


def test_ids_beyond_the_model_are_refused() -> None:
    """A token that the model has no row for never reaches it."""
    tokenizer = _opened(added({"id": len(VOCAB), "content": "<x>"}), vocab_size=len(VOCAB))
    assert tokenizer.encode("the fox")
    with pytest.raises(BundleError, match=f"the model knows {len(VOCAB)}"):
        tokenizer.encode("<x>")


def test_a_text_that_grows_may_be_shorter() -> None:
    """A growing normalizer lowers what a text may have, and the refusal is the user's, with the number."""
    tokenizer = _opened(steps(replace("a", "a" * 60)))
    assert tokenizer.encode("a" * 1000)
    with pytest.raises(InputError, match="at most 279620 are allowed"):
        tokenizer.encode("a" * 300_000)


def test_long_tokens_are_not_decoded_without_end() -> None:
    """A vocabulary of long tokens bounds how many are decoded at once."""
    tokenizer = _opened(added({"content": "x" * 4000}))
    with pytest.raises(BundleError, match="tokens to decode"):
        tokenizer.decode([len(VOCAB)] * 100_000)


def test_a_vocabulary_without_text_streams_in_linear_time() -> None:
    """Tokens that never become a whole character are not decoded again with each one that follows."""
    raw = sentencepiece(strip=False)
    tokenizer = TextTokenizer.from_files(raw.to_str().encode(), TokenizerConfig(), where="tokenizer.json")
    odd = tokenizer.encode("\ufffd" * 4000)
    decoder, start_s = IncrementalDecoder(tokenizer), time.process_time()
    pieces = [decoder.push(token) for token in odd]
    assert "".join([*pieces, decoder.flush()]) == tokenizer.decode(odd)
    assert time.process_time() - start_s < MAX_CPU_S


@pytest.mark.parametrize("ask", [-1, 1 << 40, 1 << 70])
def test_no_bare_exception_for_odd_ids(ask: int) -> None:
    """Ids that are none are no traceback."""
    with pytest.raises(BundleError):
        _opened({}).spelling(ask)


def test_no_bare_exception_for_odd_tokens() -> None:
    """Nor is a token that is no Unicode text."""
    with pytest.raises(BundleError):
        _opened({}).token_id("\ud800")


@pytest.mark.parametrize("pattern", sorted(KNOWN_PATTERNS))
@pytest.mark.parametrize(
    "unit", [" ", "a", "A", "1", ".", "\n", "  a", "!\n", "aA", "\t\n x", "'S", " \n", "你", "é"]
)
def test_known_expressions_are_linear(pattern: str, unit: str) -> None:
    """Long runs of what an expression repeats cost it no square."""
    tokenizer, start_s = _opened({"pre_tokenizer": split(pattern)}), time.process_time()
    tokenizer.encode((unit * 100_000)[:100_000] + "x")
    assert time.process_time() - start_s < MAX_CPU_S


@pytest.mark.parametrize(
    "pattern", [" {2,}", r"\s+", r"\p{N}", " ?[^\\s]+|\\s+", "[0-9]{1,3}", "[一-龥]+", r"\w+|[^\w\s]+"]
)
def test_plain_expressions_are_accepted(pattern: str) -> None:
    """A family that is not known may split with a plain expression."""
    assert is_accepted(pattern)


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "a*",
        "a|",
        "a+b",
        "a*b",
        "(a+)+",
        "(?:a|a)*",
        "a?" * 20 + "a",
        "a{1,999}",
        "(?=a)",
        "[",
        "\\",
        "a++",
        r"(a)\1",
    ],
)
def test_other_expressions_are_refused(pattern: str) -> None:
    """What may go back, match nothing, or is not understood."""
    assert not is_accepted(pattern)


@pytest.mark.parametrize("kind", ["BPE", "WordPiece", "WordLevel", "Unigram"])
def test_models_without_a_type(kind: str) -> None:
    """Checkpoints of 2020 do not name the type of their model: the exporter adds it."""
    models = {
        "BPE": BASE["model"],
        "WordPiece": WORDPIECE,
        "WordLevel": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
        "Unigram": UNIGRAM,
    }
    untyped = {name: value for name, value in models[kind].items() if name != "type"}
    data = json.dumps({**BASE, "model": untyped})
    assert json.loads(with_model_type(data.encode()))["model"] == models[kind]
