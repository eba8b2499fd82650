"""Server-sent events as the WHATWG standard has them (HTML, 9.2), from an untrusted server: bounded lines,
bounded total. Work grows with the bytes; lines that mean nothing (comments, unknown fields, empty lines in a
row) are passed over many at once.

Different from the standard in one thing: an event that the end of the stream cuts off is given too, marked
as not `whole`; endpoints that forget the last empty line are common. A caller may want
more taken than that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from edge_reasoner.errors import CloudProtocolError

#: lines that are neither empty nor `data` or `event`
_UNKNOWN_LINES = re.compile(rb"^(?!(?:data|event)[:\n])[^\n]+\n", re.MULTILINE)
#: a run of empty lines, or a field with its value
_MEANING = re.compile(rb"^(?:\n+|(?P<field>data|event)(?::[ ]?(?P<value>[^\n]*))?\n)", re.MULTILINE)
_BOM = b"\xef\xbb\xbf"
#: the same for streams of servers that know the standard by hearsay: fields indented or in other letters,
#: `error` as a field, JSON and [DONE] without one
_INDENT = rb"(?:[ \t]|" + re.escape(_BOM) + rb")*"
_BARE = rb"\{\"[^\n]*\}|\"?\[done\]\"?"
_LENIENT_UNKNOWN = re.compile(
    rb"^(?!(?:data|event)[:\n]|%b(?:(?:data|error|exception):|(?:%b)[ \t]*\n))[^\n]+\n" % (_INDENT, _BARE),
    re.MULTILINE | re.IGNORECASE,
)
_LENIENT_MEANING = re.compile(
    rb"^(?:\n+|%b(?P<field>data|event|error|exception)(?::[ ]?(?P<value>[^\n]*))?\n|%b(?P<bare>%b)[ \t]*\n)"
    % (_INDENT, _INDENT, _BARE),
    re.MULTILINE | re.IGNORECASE,
)
#: whole events without a word, after another one
_LENIENT_EMPTY = re.compile(rb"(?<=\n\n)(?:(?:data:?[ ]?)?\n)+", re.IGNORECASE)


@dataclass(frozen=True)
class Event:
    """One event. `name` is "message" where the server gave none; `whole`: an empty line ended it."""

    name: str
    data: str
    whole: bool = True


def read_events(
    chunks: Iterable[bytes],
    *,
    line_bytes: int,
    response_bytes: int,
    lenient: bool = False,
) -> Iterator[Event]:
    """The events of a byte stream, however it is cut. Ids, retry times, comments and events without data
    are skipped; bytes that are not UTF-8 become U+FFFD, as the standard says.

    `lenient` also takes what servers send that know the standard by hearsay: fields that are indented or in
    capitals, `error:` as a field (an event of that name), JSON or [DONE] on a line of its own, and an event
    without data. Raises CloudProtocolError for a line or a response beyond its bound.
    """
    name, data = "", list[str]()
    unknown, meaning = (_LENIENT_UNKNOWN, _LENIENT_MEANING) if lenient else (_UNKNOWN_LINES, _MEANING)
    for block in _whole_lines(chunks, line_bytes, response_bytes):
        block = unknown.sub(b"", block)
        for found in meaning.finditer(_LENIENT_EMPTY.sub(b"", block) if lenient else block):
            field, value, bare = (
                found.group("field") or b"",
                found.group("value") or b"",
                found.groupdict().get("bare"),
            )
            field = field.lower()
            if field == b"data":
                data.append(value.decode("utf-8", "replace"))
            elif field == b"event":
                name = value.decode("utf-8", "replace")
            else:
                if data or (name and lenient):
                    yield Event(name or "message", "\n".join(data))
                name, data = "", []
                if bare or field:
                    yield Event("error" if field else "message", (bare or value).decode("utf-8", "replace"))
    if data:
        yield Event(name or "message", "\n".join(data), whole=False)


def _whole_lines(chunks: Iterable[bytes], line_bytes: int, response_bytes: int) -> Iterator[bytes]:
    """Blocks of whole lines, each line ended by a newline, also the last."""
    rest: list[bytes] = []
    rest_bytes = total_bytes = 0
    after_cr = False
    for chunk in _without_bom(chunks):
        total_bytes += len(chunk)
        if total_bytes > response_bytes:
            raise CloudProtocolError(f"the cloud's response exceeds {response_bytes} bytes")
        if after_cr and chunk:
            # the second half of a CRLF that was cut
            chunk, after_cr = chunk.removeprefix(b"\n"), False
        after_cr = after_cr or chunk.endswith(b"\r")
        chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        end = chunk.rfind(b"\n") + 1
        if end:
            block = b"".join((*rest, chunk[:end]))
            _check_lines(block, line_bytes)
            yield block
            rest, rest_bytes = [], 0
        if end < len(chunk):
            rest.append(chunk[end:])
            rest_bytes += len(chunk) - end
        if rest_bytes > line_bytes:
            raise _too_long(line_bytes)
    if rest:
        yield b"".join((*rest, b"\n"))


def _without_bom(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Chunks without a leading byte order mark, however it is cut."""
    head: bytes | None = b""
    for chunk in chunks:
        if head is None:
            yield chunk
            continue
        head += chunk
        if len(head) >= len(_BOM) or not _BOM.startswith(head):
            yield head.removeprefix(_BOM)
            head = None
    if head:
        yield head


def _check_lines(block: bytes, line_bytes: int) -> None:
    if len(block) > line_bytes and max(map(len, block.split(b"\n"))) > line_bytes:
        raise _too_long(line_bytes)


def _too_long(line_bytes: int) -> CloudProtocolError:
    return CloudProtocolError(f"the cloud sent a line of more than {line_bytes} bytes")
