"""The preprocessor with a stand-in encoder that shows what it was given."""

from __future__ import annotations

import time

import numpy as np
import pytest
from support.tiny_tokenizers import byte_level, wrap
from tokenizers.processors import TemplateProcessing

from edge_reasoner.errors import BackendError
from edge_reasoner.preprocess.preprocessor import MAX_CHUNKS, Preprocessor


class CountingEncoder:
    """Embeds a token list as its normalized histogram; keeps what it saw."""

    dimension = 400
    context_tokens = 16

    def __init__(self) -> None:
        self.seen: list[list[list[int]]] = []

    def embed(self, token_ids: list[list[int]]) -> np.ndarray:
        self.seen.append(token_ids)
        rows = np.stack([np.bincount(ids, minlength=self.dimension) for ids in token_ids]).astype(np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def close(self) -> None:
        self.seen.clear()


def _make() -> tuple[Preprocessor, CountingEncoder, int, int]:
    raw = byte_level()
    first, last = raw.token_to_id("<s>"), raw.token_to_id("</s>")
    raw.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", first), ("</s>", last)]
    )
    encoder = CountingEncoder()
    return Preprocessor(encoder, wrap(raw), clock=time.perf_counter), encoder, first, last


def test_one_embedding_with_special_tokens() -> None:
    """A short query is one row, framed as the tokenizer says, of norm 1."""
    preprocessor, encoder, first, last = _make()
    looked = preprocessor.run("the fox?")
    ids = encoder.seen[0][0]
    assert (ids[0], ids[-1], len(encoder.seen)) == (first, last, 1)
    assert looked.features.is_question and looked.preprocess_ms > 0
    assert looked.embedding.dtype == np.float32 and np.linalg.norm(looked.embedding) == pytest.approx(
        1, abs=1e-5
    )


@pytest.mark.parametrize("words", [30, 3000])
def test_long_text_is_averaged(words: int) -> None:
    """A long text is embedded from a bounded number of framed chunks, the last words among them."""
    preprocessor, encoder, first, last = _make()
    embedding = preprocessor.embed("the fox " * words + "😀")
    chunks = encoder.seen[0]
    assert 1 < len(chunks) <= MAX_CHUNKS
    assert all(c[0] == first and c[-1] == last and len(c) <= encoder.context_tokens for c in chunks)
    assert wrap(byte_level()).decode(chunks[-1]).endswith("😀")
    assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-5)


def test_without_an_encoder() -> None:
    """Features alone; the embedding is None."""
    looked = Preprocessor(None, None, clock=time.perf_counter).run("2+2?")
    assert looked.embedding is None and looked.features.is_maths
    with pytest.raises(ValueError, match="together"):
        Preprocessor(CountingEncoder(), None, clock=time.perf_counter)


def test_an_encoder_that_fails_costs_the_embedding_only() -> None:
    """The library's failure, or a text that cannot be tokenized: features, and no embedding."""
    preprocessor, encoder, _, _ = _make()
    assert preprocessor.run("half \ud800").embedding is None

    def fail(token_ids: list[list[int]]) -> np.ndarray:
        raise BackendError("out of memory")

    encoder.embed = fail
    looked = preprocessor.run("the fox?")
    assert looked.embedding is None and looked.features.is_question
    with pytest.raises(BackendError):
        preprocessor.embed("the fox?")
