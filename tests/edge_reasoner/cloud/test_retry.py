"""What is tried again, and how long the endpoint's wish is waited for."""

from __future__ import annotations

from email.utils import formatdate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.hostile_cloud import GOOD, hostile_cloud, send, status

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.cloud.base import CloudLimits, CloudOptions
from edge_reasoner.cloud.openai_protocol import OpenAIModel
from edge_reasoner.cloud.retry import retry_after_s
from edge_reasoner.errors import CloudError, CloudUnavailableError

NOW_S = 1_700_000_000.0
THERE_S = NOW_S + 5 * 365 * 86400


@pytest.mark.parametrize(
    ("headers", "expected_s"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": " 2.5 "}, 2.5),
        ({"retry-after": "4, 9"}, 4.0),
        ({"retry-after": "9" * 400}, float("inf")),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        (
            {"retry-after": formatdate(THERE_S + 3, usegmt=True), "date": formatdate(THERE_S, usegmt=True)},
            3.0,
        ),
        (
            {"retry-after": formatdate(THERE_S - 3, usegmt=True), "date": formatdate(THERE_S, usegmt=True)},
            0.0,
        ),
        ({"retry-after": formatdate(NOW_S + 7, usegmt=True)}, 7.0),
        ({"retry-after": formatdate(NOW_S + 7, usegmt=True), "date": "yesterday"}, 7.0),
        # the two older forms of an HTTP date
        ({"retry-after": "Sunday, 06-Nov-94 08:49:37 GMT", "date": "Sun Nov  6 08:49:30 1994"}, 7.0),
        ({"retry-after": "3s"}, 3.0),
        ({"retry-after": "2.5 seconds"}, 2.5),
        ({"retry-after": "250ms"}, 0.25),
        ({"retry-after": "1m"}, 60.0),
        ({"retry-after": str(NOW_S + 7)}, 7.0),
        ({"retry-after": f"{THERE_S + 7:.0f}", "date": formatdate(THERE_S, usegmt=True)}, 7.0),
        *(
            ({"retry-after": text}, None)
            for text in ("", "soon", "-1", "nan", "inf", "1e999", "²", "Mon, 99")
        ),
    ],
)
def test_retry_after(headers, expected_s) -> None:
    """Seconds, decimals and dates; a date counts against the endpoint's own clock."""
    assert retry_after_s(headers, lambda: NOW_S) == expected_s


@example(value="0\x1f", date="")
@given(value=st.text(max_size=30), date=st.text(max_size=30))
def test_any_header_is_a_wait_or_none(value: str, date: str) -> None:
    """Whatever stands there, it is at least 0 seconds or nothing."""
    wait_s = retry_after_s({"retry-after": value, "date": date}, lambda: NOW_S)
    assert wait_s is None or wait_s >= 0


def _waits(*replies: bytes, attempts: int = 3) -> tuple[list[float], int, CloudError | None]:
    waits: list[float] = []
    limits = CloudLimits(attempts=attempts, backoff_base_s=1.0)
    with hostile_cloud(*map(send, replies)) as server:
        model = OpenAIModel(
            CloudOptions(server.url, model="m", limits=limits),
            sleep=waits.append,
            uniform=lambda low, high: high,
        )
        try:
            model.submit(ChatRequest(({"role": "user", "content": "hi"},))).result()
        except CloudError as error:
            return waits, len(server.requests), error
        finally:
            model.close()
        return waits, len(server.requests), None


@pytest.mark.parametrize("code", [408, 409, 425, 429, 500, 502, 503, 504, 520, 529])
def test_passing_failures_are_tried_again(code: int) -> None:
    """These may be gone a moment later."""
    assert _waits(status(code), GOOD) == ([1.0], 2, None)


@pytest.mark.parametrize("code", [400, 401, 402, 403, 404, 405, 410, 413, 422, 451, 501, 505])
def test_lasting_failures_are_not(code: int) -> None:
    """These will be the same a moment later."""
    waits, requests, error = _waits(status(code), GOOD)
    assert (waits, requests) == ([], 1) and f"HTTP {code}" in str(error)


def test_an_empty_account_is_not_knocked_at() -> None:
    """429 with insufficient_quota does not pass by itself."""
    body = b'{"error": {"message": "no money", "code": "insufficient_quota"}}'
    waits, requests, error = _waits(status(429, body=body), GOOD)
    assert (waits, requests) == ([], 1) and isinstance(error, CloudUnavailableError)


def test_a_wish_beyond_the_cap_ends_it() -> None:
    """A wish of an hour is not waited for, nor is the endpoint asked again before it."""
    waits, requests, error = _waits(status(429, "Retry-After: 3600\r\n"), GOOD)
    assert (waits, requests) == ([], 1) and "3600 s" in str(error)
    assert _waits(status(503, "Retry-After: 2\r\n"), GOOD) == ([3.0], 2, None)
