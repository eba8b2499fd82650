"""Whatever an endpoint or a proxy repeats of a key, on every way that ends in an error, no text has it."""

from __future__ import annotations

import base64
import contextlib
import html
import json
import logging
import time
import traceback
import unicodedata
from collections.abc import Callable
from urllib.parse import quote, unquote

import pytest
from support.hostile_cloud import HEAD, event, scripted_cloud, status
from support.local_models import scripted_model

from edge_reasoner.chat.model import ChatRequest
from edge_reasoner.cloud import connect
from edge_reasoner.cloud.base import CloudLimits, CloudOptions
from edge_reasoner.errors import CloudError
from edge_reasoner.preprocess.preprocessor import Preprocessor
from edge_reasoner.query.device import Device
from edge_reasoner.reasoner import Reasoner

KEY = "Zq7-Rk2/Wm9+Xt4_Yb6.Vn3~Jd8"
LIMITS = CloudLimits(
    connect_s=20.0, read_s=20.0, total_s=60.0, attempts=2, backoff_base_s=0.001, retry_after_cap_s=1
)
HARD = "Prove step by step why the sum of 3 primes like 5, 7 and 11 is odd, and why."
ASKED = ChatRequest(({"role": "user", "content": "hi"},))
_BASIC = base64.b64encode(f"user:{KEY}".encode()).decode()


def _wrapped(text: str, width: int, gap: str) -> str:
    return gap.join(text[at : at + width] for at in range(0, len(text), width))


#: how the key comes back
ECHOES: dict[str, str] = {
    "whole": KEY,
    "as sent": f"Authorization: Bearer {KEY}",
    "in part": f"{KEY[:11]}…",
    "in capitals": KEY.upper(),
    "wrapped": _wrapped(KEY, 6, "\n"),
    "wrapped and indented": _wrapped(KEY, 9, "\r\n    "),
    "spaced": _wrapped(KEY, 3, " "),
    "zero-width": _wrapped(KEY, 2, "\u200b"),
    "URL-encoded": quote(KEY, safe=""),
    "wholly URL-encoded": "".join(f"%{byte:02X}" for byte in KEY.encode()),
    "encoded twice": quote(quote(KEY, safe=""), safe=""),
    "HTML-escaped": "".join(f"&#{byte};" for byte in KEY.encode()),
    "JSON-escaped": "".join(f"\\u{byte:04x}" for byte in KEY.encode()),
    "Basic": f"Authorization: Basic {_BASIC}",
    "Basic, wrapped": _wrapped(_BASIC, 8, "\n"),
    "hexadecimal": KEY.encode().hex(),
}


def _error(code: int, headers: str = "", *, plain: bool = False) -> Callable[[str], bytes]:
    def reply(echo: str) -> bytes:
        text = f"no: {echo} is wrong"
        return status(
            code, headers, text.encode() if plain else json.dumps({"error": {"message": text}}).encode()
        )

    return reply


def _line(echo: str) -> str:
    """As a header can hold it."""
    return echo.replace("\r", " ").replace("\n", " ").encode("ascii", "ignore").decode()


#: name → the reply that repeats `echo` where its error will be told from
PATHS: dict[str, Callable[[str], bytes]] = {
    **{
        f"HTTP {code}": _error(code)
        for code in (400, 401, 402, 403, 404, 405, 408, 413, 415, 422, 429, 500, 503, 599)
    },
    **{f"HTTP {code} in words": _error(code, plain=True) for code in (400, 401, 500)},
    "HTTP 429 for long": _error(429, "Retry-After: 500\r\n"),
    "detail": lambda echo: status(
        422, body=json.dumps({"detail": [{"loc": ["body", echo], "msg": echo}]}).encode()
    ),
    "codes": lambda echo: status(
        400, body=json.dumps({"error": {"code": echo[:90], "type": echo[:90]}}).encode()
    ),
    "JSON in JSON": lambda echo: status(
        502, body=json.dumps({"error": f"above: {json.dumps({'message': echo})}"}).encode()
    ),
    "gateway": lambda echo: status(400, body=json.dumps({"error": {"metadata": {"raw": echo}}}).encode()),
    "redirect": lambda echo: status(
        302, f"Location: https://u:{quote(echo)}@h.example/{quote(echo)}?k={quote(echo)}\r\n"
    ),
    "redirect in words": lambda echo: status(302, f"Location: {_line(echo)}\r\n"),
    "status line": lambda echo: f"HTTP/1.1 500 {_line(echo)}\r\nContent-Length: 0\r\n\r\n".encode(),
    "bad status line": lambda echo: f"HTTP/1.1 {_line(echo)}\r\n\r\n".encode(),
    "bad header": lambda echo: f"HTTP/1.1 200 OK\r\n{_line(echo)}\r\n\r\n".encode(),
    "content type": lambda echo: f"HTTP/1.1 200 OK\r\nContent-Type: image/{_line(echo)}\r\n\r\nx".encode(),
    "content encoding": lambda echo: HEAD.replace(
        b"Connection", f"Content-Encoding: {_line(echo)}\r\nConnection".encode()
    ),
    "bad chunk": lambda echo: (
        HEAD.replace(b"Connection", b"Transfer-Encoding: chunked\r\nConnection") + echo.encode() + b"\r\n"
    ),
    "bad length": lambda echo: f"HTTP/1.1 200 OK\r\nContent-Length: {_line(echo)}\r\n\r\n".encode(),
    "error event": lambda echo: HEAD + event("", error={"message": echo}),
    "error line": lambda echo: HEAD + b"error: " + json.dumps(echo).encode() + b"\n\n",
    "error in JSON": lambda echo: status(200, body=json.dumps({"error": {"message": echo}}).encode()),
    "detail in a stream": lambda echo: HEAD + b"data: " + json.dumps({"detail": echo}).encode() + b"\n\n",
    "no JSON": lambda echo: HEAD + b"data: {" + echo.encode() + b"\n\n",
    "no event": lambda echo: HEAD + echo.encode() + b"\n\n",
    "finish reason": lambda echo: HEAD + event("", f"error {echo}"),
    "odd finish reason": lambda echo: HEAD + event(None, echo),
    "broken after it": lambda echo: HEAD + event(error={"message": echo})[:-20],
}
#: the same where the list of models is asked for
LISTS: dict[str, Callable[[str], bytes]] = {
    "models refused": _error(403),
    "models fail": _error(500),
    "no list": lambda echo: status(200, body=echo.encode()),
    "an error for a list": lambda echo: status(200, body=json.dumps({"error": {"message": echo}}).encode()),
    "no models": lambda echo: status(200, body=json.dumps({"data": [], "detail": echo}).encode()),
}


def _leaks(text: str) -> bool:
    """Whether a reader could put eight characters of the key together again."""
    for read in (
        text,
        unquote(unquote(text)),
        html.unescape(text),
        text.encode("latin-1", "ignore").decode("unicode_escape", "ignore"),
    ):
        kept = "".join(
            c for c in unicodedata.normalize("NFKC", read) if c.isprintable() and not c.isspace()
        ).lower()
        forms = (KEY.lower(), KEY.encode().hex(), _BASIC[8:-4].lower())
        if any(form[at : at + 8] in kept for form in forms for at in range(len(form) - 7)):
            return True
    return False


def _told(error: BaseException) -> str:
    """All that a program, a log or a traceback shows of an error."""
    return "\n".join(
        (str(error), repr(error), *traceback.format_exception(error), *getattr(error, "__notes__", ()))
    )


class _Asker:
    """A client, and a device that answers where the client fails; both kept for all that is asked."""

    def __init__(self, options: CloudOptions, caplog: pytest.LogCaptureFixture) -> None:
        device = Device.of(scripted_model({"": "the fox"}), Preprocessor(None, None, clock=time.perf_counter))
        self._options, self._caplog = options, caplog
        self._client, self._reasoner = connect(options), Reasoner(device, connect(options))

    def told(self) -> str:
        """What is told where the cloud is asked directly, and where the device answers instead."""
        self._caplog.clear()
        try:
            told = str(self._client.submit(ASKED).result())
        except CloudError as error:
            told = _told(error)
        stream = self._reasoner.stream(HARD, max_tokens=4)
        told += "".join(stream) + str(stream.result().to_dict())
        return told + self._caplog.text + repr(self._options)

    def close(self) -> None:
        self._client.close()
        self._reasoner.close()


def _check_all(
    reply: Callable[[str], bytes], options: Callable[[str], CloudOptions], caplog: pytest.LogCaptureFixture
) -> None:
    """Every echo comes back in the same place, and in nothing that is told."""
    current = [""]
    with scripted_cloud(lambda head, body: reply(current[0])) as server, caplog.at_level(logging.DEBUG):
        with contextlib.closing(_Asker(options(server.url), caplog)) as asker:
            for name, echo in ECHOES.items():
                current[0] = echo
                told = asker.told()
                assert not _leaks(told), (name, told)
        assert len(server.requests) >= 2 * len(ECHOES)


@pytest.mark.parametrize("path", PATHS)
def test_no_error_path_tells_the_key(path: str, caplog) -> None:
    """Errors, what caused them, tracebacks, notes of the device's own answer and the library's log."""
    _check_all(PATHS[path], lambda url: CloudOptions(url, "m", "K", {"K": KEY}, LIMITS), caplog)


@pytest.mark.parametrize("path", LISTS)
def test_no_list_of_models_tells_the_key(path: str, caplog) -> None:
    """The same where the endpoint is first asked for its models."""
    _check_all(LISTS[path], lambda url: CloudOptions(url, None, "K", {"K": KEY}, LIMITS), caplog)


def _tunnel(proxy: str) -> CloudOptions:
    place = proxy.removesuffix("/v1").replace("http://", f"http://user:{quote(KEY, safe='')}@")
    return CloudOptions("https://cloud.example/v1", "m", None, {"https_proxy": place}, LIMITS)


@pytest.mark.parametrize("code", [403, 407, 502])
def test_no_proxy_tells_its_password(code: int, caplog) -> None:
    """A proxy that repeats its own user and password while it refuses the tunnel."""

    def refusal(echo: str) -> bytes:
        said = _line(echo)
        return f"HTTP/1.1 {code} {said}\r\nX-Echo: {said}\r\nContent-Length: 0\r\n\r\n".encode()

    _check_all(refusal, _tunnel, caplog)


def test_the_search_finds_each_echo() -> None:
    """The control: every echo is seen for what it is."""
    for name, echo in ECHOES.items():
        assert _leaks(f"before {echo} after"), name
