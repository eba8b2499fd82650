"""The HTTP library's log while a request is under way: without secrets."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from edge_reasoner.cloud.redact import Redactor

#: each logs by itself; a filter of a logger above them would not see their lines
_LOGGERS = tuple(
    f"{package}{part}"
    for package in ("httpcore", "httpx")
    for part in ("", ".connection", ".http11", ".http2", ".proxy", ".socks")
)
#: of a line; hostile headers have a megabyte
_MAX_LINE_CHARS = 16_384


class _Redacting(logging.Filter):
    """Lets every line pass, without secrets. The library logs headers and errors as they arrived."""

    def __init__(self, redactor: Redactor) -> None:
        super().__init__()
        self._redactor = redactor

    def filter(self, record: logging.LogRecord) -> bool:
        """See `logging.Filter`."""
        said = record.getMessage()
        if len(said) > _MAX_LINE_CHARS:
            said = f"{said[:_MAX_LINE_CHARS]}…"
            record.msg, record.args = said, ()
        if (cleaned := self._redactor.clean(said)) != said:
            record.msg, record.args, record.exc_info, record.exc_text = cleaned, (), None, None
        return True


@contextmanager
def redacted_logs(redactor: Redactor) -> Iterator[None]:
    """Whatever the application logs of the HTTP library meanwhile has no secrets in it."""
    redacting = _Redacting(redactor)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(redacting)
    try:
        yield
    finally:
        for name in _LOGGERS:
            logging.getLogger(name).removeFilter(redacting)
