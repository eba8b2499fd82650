"""Thinking and answer are told apart, wherever the text is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_reasoner.chat.thinking import FAMILIES, Split, ThinkingSplitter, is_marker, opened_by


def split_thinking(text: str, prompt: str = "") -> Split:
    """A whole text taken apart at once."""
    splitter = ThinkingSplitter(prompt)
    splitter.push(text)
    splitter.finish()
    return splitter.split()


@pytest.mark.parametrize(
    ("text", "answer", "thinking"),
    [
        ("Paris.", "Paris.", None),
        ("  Paris.\n", "  Paris.\n", None),
        ("<think>\nEasy.\n</think>\n\nParis", "Paris", "Easy."),
        ("<think></think>\n\nB", "B", None),
        ("<think>A spider has 8, a cat 4", "", "A spider has 8, a cat 4"),
        ("It is big.\n</think>\n\nJupiter", "Jupiter", "It is big."),
        ("<THINK>x</Think>y", "y", "x"),
        ("[THINK]hm[/THINK]ok", "ok", "hm"),
        (
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>ok",
            "ok",
            "hm",
        ),
        ("<think>a</think><think>b</think>c", "c", "a\n\nb"),
        ("Use the <think> tag.", "Use the <think> tag.", None),
        ("`</think>` closes it.", "`</think>` closes it.", None),
        ("```\n<think>x</think>\n```", "```\n<think>x</think>\n```", None),
    ],
)
def test_shapes(text: str, answer: str, thinking: str | None) -> None:
    """What the families write, unclosed and lone markers, and markers that are only text."""
    split = split_thinking(text)
    assert (split.answer, split.thinking) == (answer, thinking)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.open)
def test_every_family(family) -> None:
    """A block of each family is thinking; a prompt that ends with its opening marker opened it."""
    after = "<|message|>" if family.close == "<|channel|>final" else ""
    assert split_thinking(f"{family.open}why{family.close}{after}so").answer == "so"
    assert opened_by(f"assistant\n{family.open}\n") == family.open
    opened = split_thinking(f"why{family.close}{after}so", prompt=f"x{family.open}\n")
    assert (opened.answer, opened.thinking) == ("so", "why")
    assert split_thinking("never closed", prompt=family.open).answer == ""


_MARKED = ["<think>", "</think>", "<thi", "nk>", "[THINK]", "[/THINK]", "<answer>", "</answer>"]
_HARMONY = ["<|channel|>analysis<|message|>", "<|channel|>final", "<|message|>", "<|end|>"]
_PLAIN = ["a", "b c", " ", "\n", "`", "```\n", '"']
_PARTS = st.sampled_from([*_MARKED, *_HARMONY, *_PLAIN])


@given(
    parts=st.lists(_PARTS, max_size=14),
    cuts=st.lists(st.integers(0, 120), max_size=8),
    prompt=st.sampled_from(["", "x<think>\n", "[THINK]"]),
)
def test_any_cut_gives_the_same(parts: list[str], cuts: list[int], prompt: str) -> None:
    """Shown text and result do not depend on where the pieces are cut, and the answer ends what was shown."""
    text = "".join(parts)
    whole = ThinkingSplitter(prompt)
    shown = whole.push(text) + whole.finish()
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    cut = ThinkingSplitter(prompt)
    pieces = [cut.push(text[a:b]) for a, b in itertools.pairwise(borders)]
    assert "".join(pieces) + cut.finish() == shown
    assert cut.split() == whole.split() and shown.endswith(whole.split().answer)


def test_plain_text_passes_at_once() -> None:
    """Text without markers is not held back."""
    splitter = ThinkingSplitter()
    assert [splitter.push(piece) for piece in ("The ", "answer", " is 4 < 5.")] == [
        "The ",
        "answer",
        " is 4 < 5.",
    ]


def test_markers_are_known_by_their_tokens() -> None:
    """A decoder that leaves special tokens out must keep these."""
    assert is_marker("[THINK]") and is_marker("<think>") and is_marker("<|channel|>")
    assert not is_marker("<|im_end|>") and not is_marker("</s>")
