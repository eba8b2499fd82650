"""Prompts far beyond the context are refused before they are read."""

from __future__ import annotations

import httpx
import pytest
from support.local_models import scripted_model

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.engine.tokens import TextTokenizer
from edge_reasoner.errors import ContextOverflowError
from edge_reasoner.server.reference import ReferenceModel, serving

LONG = "Tell me more. " * 280_000


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How long the texts were that were tokenized."""
    lengths: list[int] = []
    encode = TextTokenizer.encode

    def noted(self, text, **options):
        lengths.append(len(text))
        return encode(self, text, **options)

    monkeypatch.setattr(TextTokenizer, "encode", noted)
    return lengths


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": LONG[:2000]}] * 1900}),
        ("completions", {"prompt": LONG}),
    ],
)
def test_a_prompt_that_cannot_fit_is_not_read(read: list[int], path: str, asked: dict, stream: bool) -> None:
    """3.9 MB for 2,048 tokens: a 400 that says how long the text is and how long it may be."""
    with serving(ReferenceModel(scripted_model({}, context_tokens=2048))) as base:
        body = {"model": "tiny", "stream": stream, **asked}
        reply = httpx.post(f"{base}/{path}", json=body, timeout=60)
    said = reply.json()["error"]["message"]
    assert (
        reply.status_code == 400 and "characters; at most" in said and "fit a context of 2048 tokens" in said
    )
    assert all(length < 100_000 for length in read)


def test_the_bound_follows_the_vocabulary() -> None:
    """A text that the longest token could fill is counted in tokens, one character more is not read."""
    model = scripted_model({}, context_tokens=40_000)
    most = model.tokenizer.most_chars(40_000)
    assert most > 65_536, "40,000 tokens of more than one character"
    with pytest.raises(ContextOverflowError, match=r"has \d+ tokens"):
        model.submit(ChatRequest(text="x" * most))
    with pytest.raises(ContextOverflowError, match=rf"has {most + 1} characters; at most {most} fit"):
        model.submit(ChatRequest(text="x" * (most + 1)))
    model.close()


def test_long_texts_have_the_same_tokens() -> None:
    """Read as a batch or not: the pieces of a long text have the tokens that they have alone."""
    tokenizer = scripted_model({}).tokenizer
    words = "\nthe quick brown fox größer 你好 😀."
    assert tokenizer.encode(words * 4000) == tokenizer.encode(words) * 4000
