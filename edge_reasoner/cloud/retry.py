"""Which failures are worth another attempt, and how long an endpoint asks to be left alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from email.utils import mktime_tz, parsedate_tz

from edge_reasoner.cloud.faults import Fault
from edge_reasoner.errors import CloudError

_RETRY_STATUS = frozenset((408, 409, 425, 429))
#: of the server's own faults, those that another attempt will meet again
_LASTING_STATUS = frozenset((501, 505, 506, 508, 510, 511))
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
_WITH_UNIT = re.compile(r"([0-9]{1,9}(?:\.[0-9]{0,9})?) ?(ms|s(?:ec(?:ond)?s?)?|m(?:in(?:ute)?s?)?)")
_UNIT_S = {"ms": 1e-3, "s": 1.0, "se": 1.0, "m": 60.0, "mi": 60.0}
#: numbers from 2001 to 2286, if they are times
_FIRST_TIME_S, _LAST_TIME_S = 1e9, 1e10
_LASTING_CODES = frozenset(("insufficient_quota", "billing_hard_limit_reached", "billing_not_active"))
#: words for an HTTP status, as endpoints write them into their errors
_STATUS_WORDS = (
    (re.compile(r"rate_?limit|too_?many_?requests|throttl|resource_exhausted"), 429),
    (re.compile(r"overloaded|(?:service|server)_?unavailable|^unavailable$|capacity"), 503),
    (re.compile(r"bad_?gateway|upstream_error"), 502),
    (re.compile(r"gateway_?time_?out|deadline_exceeded|^time_?out(?:_error)?$"), 504),
    (re.compile(r"^(?:internal_)?server_?error$|^internal(?:_error)?$"), 500),
)

_NO_FAULT = Fault("")


class RetryError(Exception):
    """An attempt failed in a way that another may not; `wait_s` is the endpoint's wish, if it had one.

    Never leaves the cloud client.
    """

    def __init__(
        self, error: CloudError, wait_s: float | None = None, status: int = 0, fault: Fault = _NO_FAULT
    ) -> None:
        super().__init__(str(error))
        self.error = error
        self.wait_s = wait_s
        self.status = status
        self.fault = fault


def is_passing(status: int, fault: Fault) -> bool:
    """Whether a request refused with this HTTP status may be taken later."""
    if _LASTING_CODES.intersection(fault.codes):
        return False
    return status in _RETRY_STATUS or (500 <= status < 600 and status not in _LASTING_STATUS)


def named_status(fault: Fault) -> int | None:
    """The HTTP status that a failure inside a successful reply names, by number or by a word; None: none."""
    for code in fault.codes:
        if code.isascii() and code.isdecimal() and len(code) == 3:
            return int(code)
    for code in fault.codes:
        for word, status in _STATUS_WORDS:
            if word.search(code.replace("-", "_").replace(" ", "_")):
                return status
    return None


def retry_after_s(headers: Mapping[str, str], now: Callable[[], float]) -> float | None:
    """Seconds to wait as `Retry-After` says: a number, or a date.

    A date counts against the reply's own `Date`, since two clocks may differ by years; against `now` (seconds
    since 1970) only where the reply has none. None: no wish, or not readable.
    """
    in_ms = _number(headers.get("retry-after-ms", ""))
    if in_ms is not None:
        return in_ms / 1e3
    value = headers.get("retry-after", "")
    # a gateway may have added its own wish to that of the server behind it
    seconds = _number(value if value[:1].isalpha() else value.partition(",")[0])
    if seconds is not None and not _FIRST_TIME_S <= seconds < _LAST_TIME_S:
        return seconds
    # some write the time as a number, or with a unit
    then_s = _date_s(value) if seconds is None else seconds
    if then_s is None and (found := _WITH_UNIT.fullmatch(value.strip().lower())):
        return float(found[1]) * _UNIT_S[found[2][:2]]
    if then_s is None:
        return None
    there_s = _date_s(headers.get("date", ""))
    return max(0.0, then_s - (now() if there_s is None else there_s))


def _number(text: str) -> float | None:
    # as many digits as one likes: infinity is a wish too
    plain = text.strip()  # of more than float takes away
    return float(plain) if _NUMBER.fullmatch(plain) else None


def _date_s(text: str) -> float | None:
    try:
        parsed = parsedate_tz(text[:100])
        return None if parsed is None else float(mktime_tz(parsed))
    except (ValueError, OverflowError, IndexError, TypeError):
        return None
