"""Tokenizer wrapper and incremental decoding."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_tokenizers import TEXTS, byte_level, sentencepiece, wrap
from tokenizers import Tokenizer, models

from edge_reasoner.contract.bundle.tokenizer_files import TokenizerConfig, parse_tokenizer_config
from edge_reasoner.engine.tokens import IncrementalDecoder, TextTokenizer
from edge_reasoner.errors import BundleError, InputError

KINDS = {
    "byte-level": byte_level,
    "sentencepiece": functools.partial(sentencepiece, strip=True),
    "sentencepiece without strip": functools.partial(sentencepiece, strip=False),
}


@functools.cache
def _tokenizer(kind: str) -> TextTokenizer:
    return wrap(KINDS[kind]())


def _pieces(tokenizer: TextTokenizer, ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(tokenizer)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=300)
@given(data=st.data())
def test_pieces_add_up_to_the_full_decode(kind: str, data: st.DataObject) -> None:
    """For any token ids, well-formed or not, the streamed pieces concatenate to the decode of the whole."""
    tokenizer = _tokenizer(kind)
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    assert "".join(_pieces(tokenizer, ids)) == tokenizer.decode(ids)


def test_a_special_token_does_not_split_bytes() -> None:
    """Bytes around a special token are judged together, as the full decode does (found by hypothesis)."""
    tokenizer = _tokenizer("sentencepiece")
    ids = [3, 1, 131]
    assert "".join(_pieces(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(max_size=60))
def test_no_replacement_character_while_streaming(kind: str, text: str) -> None:
    """Streaming well-formed text never shows U+FFFD for a sequence that is still incomplete."""
    tokenizer = _tokenizer(kind)
    text = text.replace("\ufffd", "")
    pieces = _pieces(tokenizer, tokenizer.encode(text))
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))


@pytest.mark.parametrize("text", TEXTS)
def test_streaming_keeps_up(text: str) -> None:
    """Text is shown as soon as it is complete: after each token, at most three bytes are held back."""
    tokenizer = _tokenizer("byte-level")
    decoder, shown, ids = IncrementalDecoder(tokenizer), "", tokenizer.encode(text)
    for count, token in enumerate(ids, 1):
        shown += decoder.push(token)
        assert shown == tokenizer.decode(ids[:count]).rstrip("\ufffd")


def test_special_tokens_and_bos() -> None:
    """Special tokens are one id each, leave no text, and BOS starts a raw prompt where the config says so."""
    tokenizer = wrap(byte_level(), TokenizerConfig(add_bos=True, bos_token="<s>", eos_token="</s>"))
    ids = [tokenizer.bos_id, *tokenizer.encode("the<|im_end|>")]
    assert ids[0] == tokenizer.token_id("<s>") and ids[-1] == tokenizer.token_id("<|im_end|>")
    assert tokenizer.decode(ids) == "the" and tokenizer.decode(ids, skip_special=False).startswith("<s>")


def test_truncation_and_padding_in_the_file_are_ignored() -> None:
    """A tokenizer.json saved with truncation and padding still encodes the whole text."""
    raw = byte_level()
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    assert len(wrap(raw).encode("the quick brown fox jumps" * 4)) not in (4, 64)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{", "truncated"),
        (b'{"add_bos": 1}', "add_bos"),
        (b'{"surprise": true}', "surprise"),
        (b'{"add_bos": true}', "bos_token is not set"),
        (b" " * 70_000, "bytes"),
        (b"\xff\xfe", "invalid"),
    ],
)
def test_malformed_config_is_refused(data: bytes, says: str) -> None:
    """Each malformation of tokenizer_config.json is one BundleError that names it."""
    with pytest.raises(BundleError, match=says):
        parse_tokenizer_config(data, "tokenizer/reasoner/tokenizer_config.json")


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"[]", b"\xff", b'{"version": "1.0", "model": {"type": "Nope"}}']
)
def test_malformed_tokenizer_is_refused(data: bytes) -> None:
    """A tokenizer.json that is not one gives a BundleError with its place."""
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        TextTokenizer.from_files(data, TokenizerConfig(), where="tokenizer.json")


def test_bos_must_exist() -> None:
    """A config that names an unknown BOS token is refused."""
    with pytest.raises(BundleError, match="bos_token"):
        wrap(byte_level(), TokenizerConfig(add_bos=True, bos_token="<bos>"))


def test_lone_surrogates_are_refused() -> None:
    """Text that is not Unicode is refused with its position, before the Rust library sees it."""
    with pytest.raises(InputError, match="character 2"):
        _tokenizer("byte-level").encode("ab\ud800")


@pytest.mark.parametrize("unknown", ["<no such token>", "\x00", "x" * 300])
def test_an_odd_unknown_token_stays_in_the_error_tree(unknown: str) -> None:
    """A definition whose unknown token is no token fails on use, as a BundleError of one line."""
    raw = Tokenizer(models.WordLevel({"a": 0}, unk_token=unknown))
    with pytest.raises(BundleError, match=r"tokenizer\.json: not a usable tokenizer") as caught:
        wrap(raw).encode("b")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("ids", [[-1], [1 << 40], [1 << 70]])
def test_ids_that_are_none_stay_in_the_error_tree(ids: list[int]) -> None:
    """What is no token id for the library is no traceback either."""
    with pytest.raises(BundleError):
        wrap(byte_level()).decode(ids)
