"""Reads the body of a successful reply, an event stream or JSON, into an answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import chain

from edge_reasoner.chat.model import thought_of
from edge_reasoner.cloud.answer import AnswerUnderWay
from edge_reasoner.cloud.base import CloudLimits
from edge_reasoner.cloud.faults import Fault, parse_fault, parse_json
from edge_reasoner.cloud.parts import EndpointFailedError, parse_part
from edge_reasoner.cloud.sse import Event, read_events
from edge_reasoner.errors import CloudProtocolError, CloudUnavailableError, one_line

_BOM = b"\xef\xbb\xbf"
_PINGS = frozenset(("ping", "heartbeat", "keepalive", "keep-alive"))
#: names of events, and fields of lines, that report a failure
_FAILED_NAME = re.compile(r"error|exception|fail(?:ed|ure)?(?![a-z])|abort", re.IGNORECASE)
#: gateways wrap what is wrapped already
_DATA = re.compile(r"\A\s*(?:data:\s*)+", re.IGNORECASE)
_COMMENTS = re.compile(rb"\s*(?::[^\r\n]*[\r\n]\s*)*")
#: a comment longer than this is not looked behind
_MAX_COMMENT_BYTES = 16 * 1024
_MAX_SHOWN_CHARS = 200


class FailedAnswerError(CloudProtocolError):
    """The endpoint reports a failure inside a reply that looked like success."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(f"failed while answering{fault.shown or ': the endpoint reports an error'}")
        self.fault = fault


def read_answer(chunks: Iterable[bytes], answer: AnswerUnderWay, limits: CloudLimits) -> Iterator[str]:
    """Adds a body to `answer` as it arrives; yields what may be shown, with its thinking, also empty texts.

    Whether it is a stream or JSON shows in its first character: content types are often wrong. Raises
    FailedAnswerError for a failure that it reports, CloudProtocolError for what is no answer,
    CloudUnavailableError if it ends before the answer does.
    """
    chunks = iter(chunks)
    start, chunks = _peeked(chunks)
    if start in (b"{", b"["):
        yield from _whole(b"".join(chunks), answer, limits)
    elif start == b"<":
        raise CloudProtocolError("a page of HTML or XML instead of an answer; is that the URL of the API?")
    else:
        events = _Events(answer, limits)
        for event in read_events(
            chunks, line_bytes=limits.line_bytes, response_bytes=limits.response_bytes, lenient=True
        ):
            yield from events.add(event)
            if events.done:
                return
        events.end()


def _whole(body: bytes, answer: AnswerUnderWay, limits: CloudLimits) -> Iterator[str]:
    """A reply that is JSON, or a JSON value per line."""
    body = body.removeprefix(_BOM)
    body = body[_comments_end(body) :]
    try:
        yield _add(answer, body, limits)
    except _NotAPartError as error:
        lines = [line for line in body.splitlines() if line.strip()]
        if len(lines) < 2 or not _is_json(lines[0]):
            raise CloudProtocolError(str(error)) from error
        events = _Events(answer, limits)
        for number, line in enumerate(lines, 1):
            text = line.decode("utf-8", "replace")
            yield from events.add(Event("message", text, whole=number < len(lines)))
        if not events.done:
            events.end()
    else:
        yield answer.end()


class _Events:
    """Adds the events of a stream to an answer."""

    def __init__(self, answer: AnswerUnderWay, limits: CloudLimits) -> None:
        self._answer = answer
        self._limits = limits
        #: the stream says that it has ended
        self.done = False
        self._idle_events = 0

    def add(self, event: Event) -> Iterator[str]:
        """Adds an event; yields what may be shown."""
        for part in _separated(event):
            if self.done:
                return
            idle, settled_s = True, self._answer.settled_s
            for piece in self._add(part):
                says = bool(piece or thought_of(piece))
                idle &= not says
                # that there is less time now is told too
                if says or self._answer.settled_s != settled_s:
                    yield piece
            self._idle_events += idle
            if self._idle_events > self._limits.idle_events:
                raise CloudProtocolError(f"more than {self._limits.idle_events} events that say nothing")

    def end(self) -> None:
        """Raises CloudUnavailableError if the answer is not whole."""
        if not self._answer.complete:
            raise self._unfinished()

    def _add(self, event: Event) -> Iterator[str]:
        data = _DATA.sub("", event.data).strip()
        if _FAILED_NAME.search(event.name):
            raise FailedAnswerError(parse_fault(data.encode("utf-8", "replace")))
        if not data or event.name in _PINGS:
            return
        if data.strip('"').upper() == "[DONE]":
            yield self._answer.end()
            self.done = True
            return
        try:
            yield _add(self._answer, data, self._limits)
        except _NotAPartError as error:
            if not event.whole and not self._answer.complete:
                raise self._unfinished() from error
            # events with a name of their own are not for us, nor is what follows the answer
            if event.name == "message" and not self._answer.complete:
                shown = "" if data[0] in "{[" else f": {one_line(data, _MAX_SHOWN_CHARS)}"
                raise CloudProtocolError(f"{error}{shown}") from error

    def _unfinished(self) -> CloudUnavailableError:
        said = one_line(self._answer.remark, _MAX_SHOWN_CHARS)
        return CloudUnavailableError(f"the stream ended before the answer did{f': {said}' if said else ''}")


def _separated(event: Event) -> Iterator[Event]:
    """The event, or its lines where an endpoint leaves out the empty lines between its events."""
    lines = [line for line in event.data.split("\n") if line.strip()]
    if len(lines) < 2 or not _is_json(_DATA.sub("", lines[0])):
        yield event
        return
    for number, line in enumerate(lines, 1):
        yield Event(event.name, line, whole=event.whole or number < len(lines))


def _is_json(text: str | bytes) -> bool:
    try:
        parse_json(text)
    except ValueError:
        return False
    return True


class _NotAPartError(Exception):
    """What arrived is no part of an answer."""


def _add(answer: AnswerUnderWay, data: bytes | str, limits: CloudLimits) -> str:
    try:
        part = parse_part(data, answer.index)
    except EndpointFailedError as error:
        raise FailedAnswerError(error.fault) from error
    except CloudProtocolError as error:
        raise _NotAPartError(str(error)) from error
    text = answer.add(part)
    if answer.too_long:
        raise CloudProtocolError(f"an answer of more than {limits.answer_chars} characters")
    return text


def _peeked(chunks: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first byte that is neither space, byte order mark nor comment, and all chunks."""
    kept, rest, at_start = bytearray(), b"", True
    for chunk in chunks:
        kept += chunk
        rest += chunk
        if at_start and _BOM.startswith(rest):
            continue
        rest, at_start = rest.removeprefix(_BOM) if at_start else rest, False
        rest = rest[_comments_end(rest) :]
        # a colon: the comment goes on
        if rest and (not rest.startswith(b":") or len(rest) > _MAX_COMMENT_BYTES):
            return rest[:1], chain((bytes(kept),), chunks)
    return b"", iter((bytes(kept),))


def _comments_end(text: bytes) -> int:
    found = _COMMENTS.match(text)
    assert found is not None, "the pattern matches nothing as well"
    return found.end()
