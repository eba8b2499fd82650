"""Server-sent events as the WHATWG standard has them (HTML, 9.2), from an untrusted server: bounded lines,
bounded total.

Different from the standard in one thing: an event that the end of the stream cuts off is given too, marked
as not `whole`; endpoints that forget the last empty line are common.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from edge_reasoner.errors import CloudProtocolError

_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Event:
    """One event. `name` is "message" where the server gave none; `whole`: an empty line ended it."""

    name: str
    data: str
    whole: bool = True


def read_events(chunks: Iterable[bytes], *, line_bytes: int, response_bytes: int) -> Iterator[Event]:
    """The events of a byte stream, however it is cut. Ids, retry times, comments and events without data
    are skipped; bytes that are not UTF-8 become U+FFFD, as the standard says.

    Raises CloudProtocolError for a line or a response beyond its bound.
    """
    name, data = "", list[str]()
    for line in _lines(chunks, line_bytes, response_bytes):
        if not line:
            if data:
                yield Event(name or "message", "\n".join(data))
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            data.append(value)
        elif field == "event":
            name = value
    if data:
        yield Event(name or "message", "\n".join(data), whole=False)


def _lines(chunks: Iterable[bytes], line_bytes: int, response_bytes: int) -> Iterator[str]:
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
        at = 0
        for end in _LINE_END.finditer(chunk):
            rest.append(chunk[at : end.start()])
            yield _text(b"".join(rest), line_bytes)
            rest, rest_bytes, at = [], 0, end.end()
        after_cr = after_cr or chunk.endswith(b"\r")
        if at < len(chunk):
            rest.append(chunk[at:])
            rest_bytes += len(chunk) - at
        if rest_bytes > line_bytes:
            raise _too_long(line_bytes)
    if rest:
        yield _text(b"".join(rest), line_bytes)


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


def _text(line: bytes, line_bytes: int) -> str:
    if len(line) > line_bytes:
        raise _too_long(line_bytes)
    return line.decode("utf-8", "replace")


def _too_long(line_bytes: int) -> CloudProtocolError:
    return CloudProtocolError(f"the cloud sent a line of more than {line_bytes} bytes")
