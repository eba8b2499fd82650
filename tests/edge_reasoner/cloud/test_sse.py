"""Server-sent events: the standard's own examples, an independent reading of it, and hostile bytes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_reasoner.cloud.sse import Event, read_events
from edge_reasoner.errors import CloudProtocolError


def _events(*chunks: bytes) -> list[Event]:
    return list(read_events(chunks, line_bytes=10_000, response_bytes=1_000_000))


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        # the examples of HTML, 9.2.6
        (b"data: This is the first message.\n\n", ["This is the first message."]),
        (b"data: YHOO\ndata: +2\ndata: 10\n\n", ["YHOO\n+2\n10"]),
        (
            b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\n",
            ["first event", "second event"],
        ),
        (b"data\n\ndata\ndata\n\n", ["", "\n"]),
        (b"data:test\n\ndata: test\n\n", ["test", "test"]),
        (b"retry: 10\nid: 7\nunknown: x\ndata:  two spaces\n\n", [" two spaces"]),
        (b"\xef\xbb\xbfdata: a\r\rdata: b\r\n\r\ndata: c\n\n", ["a", "b", "c"]),
        ("data: é\u2028ü\x0b\n\n".encode(), ["é\u2028ü\x0b"]),
        (b"data: \xff\xfe\n\n", ["\ufffd\ufffd"]),
    ],
)
@pytest.mark.parametrize("cut", [1, 2, 3, 1000])
def test_examples_of_the_standard(stream: bytes, expected: list[str], cut: int) -> None:
    """Each example gives the standard's events, however the bytes are cut."""
    chunks = [stream[at : at + cut] for at in range(0, len(stream), cut)]
    assert [event.data for event in _events(*chunks)] == expected


def test_names_and_an_end_that_is_cut_off() -> None:
    """An event has its name; one without its empty line is given, and marked."""
    assert _events(b"event: ping\ndata: 1\n\n", b"data: 2\n\nevent: x\n\ndata: 3") == [
        Event("ping", "1"),
        Event("message", "2"),
        Event("message", "3", whole=False),
    ]


def _as_the_standard_says(stream: bytes) -> list[str]:
    """The standard's algorithm on a whole stream, word by word, with nothing clever."""
    text = stream.decode("utf-8", "replace").removeprefix("\ufeff")
    lines = re.split("\r\n|\n|\r", text)
    events, buffer = [], ""
    for line in lines[:-1]:
        if line == "":
            if buffer != "":
                events.append(buffer[:-1])
            buffer = ""
        elif line.startswith(":"):
            continue
        else:
            field, value = (line.split(":", 1) if ":" in line else (line, ""))[:2]
            value = value[1:] if value.startswith(" ") else value
            if field == "data":
                buffer += value + "\n"
    return events


_LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [b"\n", b"\r", b"\r\n", b"data", b"data:", b"data: ", b":", b" ", b"\xef\xbb\xbf", b"id: 1"]
        ),
        st.text(max_size=5).filter(lambda text: text.isprintable()).map(str.encode),
    ),
    max_size=40,
)


@given(parts=_LINES, cut=st.integers(1, 7))
def test_agrees_with_the_standard_read_word_by_word(parts: list[bytes], cut: int) -> None:
    """Any mixture of fields and line ends, cut anywhere, gives what the standard's algorithm gives."""
    stream = b"".join(parts)
    chunks = [stream[at : at + cut] for at in range(0, len(stream), cut)]
    assert [event.data for event in _events(*chunks) if event.whole] == _as_the_standard_says(stream)


@given(chunks=st.lists(st.binary(max_size=60)))
def test_any_bytes_are_events_or_an_error(chunks: list[bytes]) -> None:
    """Arbitrary bytes give the standard's events, or a CloudProtocolError where a bound was crossed."""
    stream = b"".join(chunks)
    try:
        events = list(read_events(chunks, line_bytes=50, response_bytes=500))
    except CloudProtocolError as error:
        assert "exceeds 500" in str(error) or "more than 50" in str(error) or "UTF-8" in str(error)
        return
    assert len(stream) <= 500
    assert [event.data for event in events if event.whole] == _as_the_standard_says(stream)


def test_bounds() -> None:
    """A line and a response beyond their bounds are refused, in one chunk or in many."""
    for chunks in ([b"data: " + b"a" * 100], [b"a"] * 100, [b"a" * 100 + b"\n"]):
        with pytest.raises(CloudProtocolError, match="line of more than 50"):
            list(read_events(chunks, line_bytes=50, response_bytes=500))
    with pytest.raises(CloudProtocolError, match="exceeds 500"):
        list(read_events([b": ping\n"] * 100, line_bytes=50, response_bytes=500))


def _calls(act: Callable[[], object]) -> int:
    """How many functions, Python's and C's, `act` calls."""
    count = 0

    def note(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "idle", [b": ping\n", b":\n\n", b"\n", b"\r\n", b"\r", b"x\n:\n\n", b"id: 1\r\n", b"dat\n\nevents:\n"]
)
def test_lines_that_say_nothing_cost_next_to_nothing(idle: bytes) -> None:
    """A hundred times as many of them in a chunk are passed over with the same number of steps."""

    def read(count: int) -> None:
        stream = [b"data: a\n", idle * count, b"\ndata: b\n\n"]
        events = list(read_events(stream, line_bytes=50, response_bytes=10_000_000))
        assert [event.data for event in events] in (["a", "b"], ["a\nb"])

    read(1)
    assert _calls(lambda: read(50_000)) <= _calls(lambda: read(500)) + 5


def test_each_byte_is_handled_once_however_it_is_cut() -> None:
    """A line in single bytes: steps grow with the bytes, and no faster."""

    def read(count: int) -> None:
        sent = [b"d", b"ata: ", *[b"x"] * count, b"\n", b"\n"]
        (event,) = read_events(sent, line_bytes=10**6, response_bytes=10**6)
        assert len(event.data) == count

    assert _calls(lambda: read(4000)) <= 4.1 * _calls(lambda: read(1000))


def test_the_bounds_hold_for_lines_that_say_nothing() -> None:
    """A comment may not be longer than a line, nor many of them than a response."""
    for chunks in ([b":" + b"a" * 50 + b"\n"], [b"\n\n:" + b"a" * 50 + b"\n\n"], [b":", b"a" * 50]):
        with pytest.raises(CloudProtocolError, match="line of more than 50"):
            list(read_events(chunks, line_bytes=50, response_bytes=10**6))
    fits = [b":" + b"a" * 49 + b"\n", b"\n" * 1000, b"data: 1\n\n"]
    assert [e.data for e in read_events(fits, line_bytes=50, response_bytes=10**6)] == ["1"]
