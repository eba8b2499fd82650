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
        (
            "<|start|>assistant<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final"
            "<|message|>ok<|return|>",
            "ok",
            "hm",
        ),
        ("<|channel|>final<|message|>ok", "ok", None),
        ("<|start|>assistant<|channel|>final <|constrain|>JSON<|message|>{}<|return|>", "{}", None),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary to=functions.f "
            "<|constrain|>json<|message|>{}<|call|><|start|>assistant<|channel|>final<|message|>ok",
            "ok",
            "a\nfunctions.f \njson\n{}",
        ),
        ("<|channel|>analysis<|message|>a<|end|>", "", "a"),
        ("a<|end|><|start|>assistant<|channel|>final<|message|>ok", "ok", "a"),
        ("<think>a</think><think>b</think>c", "c", "a\n\nb"),
        ("<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|>", "b", "a"),
        ("<thinking>a</thinking>\n<output>b</output>", "b", "a"),
        ("<seed:think>a</seed:think>b", "b", "a"),
        ("<|think|>a<|end|><|begin|>assistant<|content|>b", "b", "a"),
        ("<|begin|>assistant<|content|>b", "b", None),
        ("<mm:think>a</mm:think>b", "b", "a"),
        ("<|channel>thought\na<channel|>b", "b", "a"),
        ("Here is my thought process:\na\n\nHere is my response:\nb", "b", "a"),
        ("Here's my thought process: a Here is my response: b", "b", "a"),
        ("Here is my thought process: I added both.", "Here is my thought process: I added both.", None),
        ("First. Here is my response: b", "First. Here is my response: b", None),
        ("Here are my reasoning steps:\na\n[BEGIN FINAL RESPONSE]\nb\n[END FINAL RESPONSE]", "b\n", "a"),
        ("a\n[BEGIN FINAL RESPONSE]\nb", "b", "a"),
        ("Use the <think> tag.", "Use the <think> tag.", None),
        ("`</think>` closes it.", "`</think>` closes it.", None),
        ("The </think> tag closes it.", "The </think> tag closes it.", None),
        ("Write <think> first, then </think>.", "Write <think> first, then </think>.", None),
        ('It says "</think>" there.', 'It says "</think>" there.', None),
        ("Hm, so 4. </think> four", "four", "Hm, so 4."),
        ("a </think> B", "B", "a"),
        ("never</think>", "", "never"),
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
_HARMONY += ["<|start|>assistant", "<|channel|>commentary to=", "<|channel|>final<|message|>", "<|return|>"]
_WORDS = ["Here is my thought process:", "Here's my response:", "Here", "[BEGIN FINAL RESPONSE]"]
_PLAIN = ["a", "b c", " ", "\n", "`", "```\n", '"']
_PARTS = st.sampled_from([*_MARKED, *_HARMONY, *_WORDS, *_PLAIN])


@given(
    parts=st.lists(_PARTS, max_size=14),
    cuts=st.lists(st.integers(0, 120), max_size=8),
    prompt=st.sampled_from(["", "x<think>\n", "[THINK]"]),
)
def test_any_cut_gives_the_same(parts: list[str], cuts: list[int], prompt: str) -> None:
    """Shown text, told thinking and result do not depend on where the pieces are cut; the answer ends what
    was shown."""
    text = "".join(parts)
    whole = ThinkingSplitter(prompt)
    shown = whole.push(text) + whole.finish()
    told = whole.take_thought()
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    cut = ThinkingSplitter(prompt)
    pieces, thoughts = [], []
    for a, b in itertools.pairwise(borders):
        pieces.append(cut.push(text[a:b]))
        thoughts.append(cut.take_thought())
    assert "".join(pieces) + cut.finish() == shown
    assert "".join(thoughts) + cut.take_thought() == told
    assert cut.split() == whole.split() and shown.endswith(whole.split().answer)


_HARMONY_ANSWER = (
    "<|start|>assistant<|channel|>analysis<|message|>{}<|end|>"
    "<|start|>assistant<|channel|>final<|message|>{}<|return|>"
)
_SHAPES = [
    _HARMONY_ANSWER,
    "<think>\n{}\n</think>\n\n{}",
    "<|START_THINKING|>{}<|END_THINKING|><|START_RESPONSE|>{}<|END_RESPONSE|>",
    "[THINK]{}[/THINK]{}",
    "<|think|>{}<|end|><|begin|>assistant<|content|>{}",
    "<seed:think>{}</seed:think>{}",
    "<|channel>thought\n{}<channel|>{}",
    "Here is my thought process:\n{}\n\nHere is my response:\n{}",
    "Here are my reasoning steps:\n{}\n[BEGIN FINAL RESPONSE]{}[END FINAL RESPONSE]",
]


@given(
    shape=st.sampled_from(_SHAPES),
    thinking=st.text("ab< |\n", max_size=20).filter(str.strip),
    answer=st.text("ab< |\n", max_size=20).filter(str.strip),
)
def test_char_by_char(shape: str, thinking: str, answer: str) -> None:
    """What real families write, one character at a time: what was told is the thinking, what was shown the
    answer."""
    splitter = ThinkingSplitter()
    shown = told = ""
    for character in shape.format(thinking, answer):
        shown += splitter.push(character)
        told += splitter.take_thought()
    shown += splitter.finish()
    told += splitter.take_thought()
    assert (shown, told) == (answer.lstrip(), thinking.strip())
    assert splitter.split().answer == shown and splitter.split().thinking == told


def test_thinking_is_told_as_it_comes() -> None:
    """Each piece at once, but for blanks that may be its last; a blank line stands between two blocks."""
    splitter, told = ThinkingSplitter(), []
    for piece in ("<think>\n", "so ", "it is", "</think>", "\n<think>", "or not", "</think>", "yes"):
        splitter.push(piece)
        told.append(splitter.take_thought())
    assert told == ["", "so", " it is", "", "", "\n\nor not", "", ""]


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
    # elsewhere it ends a turn
    assert is_marker("<|end|>", harmony=True) and not is_marker("<|end|>")
