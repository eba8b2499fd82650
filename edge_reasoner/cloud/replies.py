"""Reads the body of a successful reply, an event stream or JSON, into an answer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain

from edge_reasoner.cloud.answer import AnswerUnderWay
from edge_reasoner.cloud.base import CloudLimits
from edge_reasoner.cloud.faults import Fault, parse_fault
from edge_reasoner.cloud.parts import EndpointFailedError, parse_part
from edge_reasoner.cloud.sse import Event, read_events
from edge_reasoner.errors import CloudProtocolError, CloudUnavailableError, one_line

_BOM = b"\xef\xbb\xbf"
_PINGS = frozenset(("ping", "heartbeat", "keepalive", "keep-alive"))


def read_answer(chunks: Iterable[bytes], answer: AnswerUnderWay, limits: CloudLimits) -> Iterator[str]:
    """Adds a body to `answer` as it arrives; yields what may be shown, with its thinking, also empty texts.

    Whether it is a stream or JSON shows in its first character: content types are often wrong. Raises
    CloudProtocolError for a failure that it reports and for what is no answer, CloudUnavailableError if it
    ends before the answer does.
    """
    chunks = iter(chunks)
    start, chunks = _peeked(chunks)
    if start in (b"{", b"["):
        try:
            yield _add(answer, b"".join(chunks), limits)
        except _NotAPartError as error:
            raise CloudProtocolError(str(error)) from error
        yield answer.end()
    else:
        yield from _events(chunks, answer, limits)


def _events(chunks: Iterable[bytes], answer: AnswerUnderWay, limits: CloudLimits) -> Iterator[str]:
    for event in read_events(chunks, line_bytes=limits.line_bytes, response_bytes=limits.response_bytes):
        data = event.data.strip()
        if not data or event.name in _PINGS:
            continue
        if data == "[DONE]":
            yield answer.end()
            return
        if event.name == "error":
            raise _failed(parse_fault(data.encode("utf-8", "replace")))
        yield from _event(event, answer, limits)
    if not answer.complete:
        raise _unfinished(answer)


def _event(event: Event, answer: AnswerUnderWay, limits: CloudLimits) -> Iterator[str]:
    try:
        yield _add(answer, event.data, limits)
    except _NotAPartError as error:
        if not event.whole:
            raise _unfinished(answer) from error
        # events with a name of their own are not for us
        if event.name == "message":
            raise CloudProtocolError(str(error)) from error


class _NotAPartError(Exception):
    """What arrived is no part of an answer."""


def _add(answer: AnswerUnderWay, data: bytes | str, limits: CloudLimits) -> str:
    try:
        part = parse_part(data, first=not answer.shown)
    except EndpointFailedError as error:
        raise _failed(error.fault) from error
    except CloudProtocolError as error:
        raise _NotAPartError(str(error)) from error
    text = answer.add(part)
    if answer.too_long:
        raise CloudProtocolError(f"an answer of more than {limits.answer_chars} characters")
    return text


def _failed(fault: Fault) -> CloudProtocolError:
    return CloudProtocolError(f"failed while answering{fault.shown or ': the endpoint reports an error'}")


def _unfinished(answer: AnswerUnderWay) -> CloudUnavailableError:
    said = f": {one_line(answer.remark)}" if answer.remark else ""
    return CloudUnavailableError(f"the stream ended before the answer did{said}")


def _peeked(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first byte that is neither space nor byte order mark, and all chunks."""
    kept, head, at_start = bytearray(), b"", True
    for chunk in chunks:
        kept += chunk
        head += chunk
        if at_start and _BOM.startswith(head):
            continue
        text = (head.removeprefix(_BOM) if at_start else head).lstrip()
        if text:
            return text[:1], chain((bytes(kept),), chunks)
        head, at_start = b"", False
    return b"", iter((bytes(kept),))
