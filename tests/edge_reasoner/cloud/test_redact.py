"""A key never leaves the client, whatever echoes it."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import traceback
from urllib.parse import quote

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.hostile_cloud import GOOD, HEAD, event, hostile_cloud, send, status

from edge_reasoner.cloud.base import CloudOptions
from edge_reasoner.cloud.endpoint import parse_endpoint
from edge_reasoner.cloud.openai_protocol import OpenAIModel
from edge_reasoner.cloud.redact import PART_CHARS, PieceRedactor, Redactor, shown_url
from edge_reasoner.errors import CloudError, CloudUnavailableError
from edge_reasoner.privacy.fold import unescaped

KEY = "sk-proj-Abcdefghij/+0123456789MNOPqrst"
_KEYS = st.text("abAB01-_/+=.", min_size=PART_CHARS, max_size=40)


def _leaks(text: str, key: str = KEY) -> bool:
    return any(key[at : at + PART_CHARS] in text for at in range(len(key) - PART_CHARS + 1))


@pytest.mark.parametrize(
    "echo",
    [
        KEY,
        f"Bearer {KEY}",
        KEY[:12] + "…",
        "…" + KEY[-9:],
        KEY.upper(),
        quote(KEY, safe=""),
        base64.b64encode(KEY.encode()).decode(),
        base64.b64encode(f":{KEY}".encode()).decode(),
        base64.b64encode(f"user:{KEY}".encode()).decode(),
        base64.urlsafe_b64encode(f"Bearer {KEY}".encode()).decode(),
        KEY.encode().hex(),
    ],
)
def test_forms_and_parts_are_found(echo: str) -> None:
    """The key whole, in part, in other letters and encodings is masked; what stands around it is kept."""
    cleaned = Redactor((KEY,)).clean(f"before {echo} after")
    assert cleaned.startswith("before ") and cleaned.endswith(" after") and "***" in cleaned
    lower = cleaned.lower()
    for start in range(0, len(echo) - PART_CHARS, 5):
        tail = echo[start : start + PART_CHARS + 5].lower()
        assert tail not in lower or tail in "before bearer  after"


def _wrapped(text: str, width: int, with_: str) -> str:
    return with_.join(text[at : at + width] for at in range(0, len(text), width))


@pytest.mark.parametrize(
    "echo",
    [
        *(_wrapped(KEY, width, gap) for width in (1, 3, 7, 11) for gap in ("\n", " ", "\r\n  ", "\t", "\\n")),
        *(
            _wrapped(KEY, 5, gap)
            for gap in ("\u200b", "\u00ad", "\u00a0", "\x00", "<br>", "<br />", "\ufffd")
        ),
        _wrapped(base64.b64encode(f"user:{KEY}".encode()).decode(), 10, "\n"),
        _wrapped(KEY.encode().hex(), 6, " "),
        "".join(f"%{byte:02x}" for byte in KEY.encode()),
        "".join(f"\\u{byte:04x}" for byte in KEY.encode()),
        "".join(f"\\x{byte:02X}" for byte in KEY.encode()),
        "".join(f"&#{byte};" for byte in KEY.encode()),
        "".join(f"&#x{byte:x};" for byte in KEY.encode()),
        quote(quote(KEY, safe=""), safe=""),
        KEY.replace("-", "%2D").replace("/", "\\u002f"),
    ],
)
def test_wrapped_and_escaped_forms_are_found(echo: str) -> None:
    """Whatever stands between the key's characters, or for them: nothing is left that gives it back."""
    cleaned = Redactor((KEY,)).clean(f"before: {echo} after")
    assert cleaned.startswith("before: ") and cleaned.endswith(" after") and "***" in cleaned
    squeezed = "".join(unescaped(cleaned).split()).lower()
    assert not _leaks(squeezed, KEY.lower())


def test_cleaning_is_stable_and_leaves_the_rest() -> None:
    """Cleaned once is cleaned; texts without secrets come back as they were, escapes and all."""
    redactor = Redactor((KEY,))
    for text in ("50 %20 off \\u0041 <br>\n a  b", f"x {_wrapped(KEY, 4, ' ')} y %41"):
        assert redactor.clean(redactor.clean(text)) == redactor.clean(text)
    assert redactor.clean("50 %20 off \\u0041 <br>\n a  b") == "50 %20 off \\u0041 <br>\n a  b"


@pytest.mark.parametrize(
    "reply",
    [
        status(400, body=json.dumps({"error": {"message": "bad key " + _wrapped(KEY, 6, "\n")}}).encode()),
        status(401, body=quote(f"Authorization: Bearer {KEY}").encode()),
        status(403, body=base64.b64encode(f"user:{KEY}".encode())),
        status(500, body=json.dumps({"detail": "".join(f"\\u{b:04x}" for b in KEY.encode())}).encode()),
        HEAD + event("", error={"message": _wrapped(KEY, 4, " ")}),
    ],
)
def test_a_wrapped_echo_is_in_no_error(ask, reply: bytes) -> None:
    """Nor in what a traceback prints of it."""
    with hostile_cloud(send(reply)) as server, pytest.raises(CloudError) as caught:
        ask(server.url, environment={"OPENAI_API_KEY": KEY})
    printed = "".join(traceback.format_exception(caught.value))
    assert not _leaks("".join(unescaped(printed).split()))
    assert base64.b64encode(KEY.encode()).decode()[8:24] not in printed


def test_the_log_of_the_http_library_has_no_key(ask, caplog) -> None:
    """Headers and errors that echo the key come without it, also at the finest level; the log is left as it
    was."""
    echo = b"X-Echo: " + KEY.encode() + b"\r\nConnection"
    replies = (GOOD.replace(b"Connection", echo), b"HTTP/1.1 200 OK\r\nBad " + KEY.encode() + b"\r\n\r\n")
    before = list(logging.getLogger("httpcore.http11").filters)
    with caplog.at_level(logging.DEBUG), contextlib.suppress(CloudError):
        for reply in replies:
            with hostile_cloud(send(reply)) as server:
                ask(server.url, environment={"OPENAI_API_KEY": KEY})
    assert "receive_response_headers" in caplog.text and "***" in caplog.text
    assert not _leaks(caplog.text) and logging.getLogger("httpcore.http11").filters == before


def test_what_is_shown_of_the_options_has_no_secret() -> None:
    """As a debugger or a log would print them."""
    options = CloudOptions(f"https://u:{KEY}@h/v1?key={KEY}", "m", "K", {"K": KEY})
    assert not _leaks(repr(options)) and "https://h/v1" in repr(options)
    model = OpenAIModel(CloudOptions(f"https://h/v1?key={KEY}", "m", "K", {"K": KEY}))
    assert not _leaks(repr(model)) and not _leaks(repr(parse_endpoint(f"https://h/v1?key={KEY}")))
    model.close()


def test_short_keys_are_whole_words() -> None:
    """ "none" as a key does not eat nonetheless."""
    assert Redactor(("none",)).clean("nonetheless none, (NONE)") == "nonetheless ***, (***)"
    assert Redactor(("",)).clean("text") == Redactor(()).clean("text") == "text"


def test_users_in_urls_are_masked() -> None:
    """Neither in a text nor in a URL that is shown is there a user or password, nor a query."""
    text = Redactor(()).clean("via http://u:p@ss@proxy:3128/ and mail a@b.c")
    assert text == "via http://***@proxy:3128/ and mail a@b.c"
    assert shown_url("https://u:p@ss@host/v1?key=sk#x") == "https://host/v1"
    assert shown_url("host/v1?api_key=sk") == "host/v1"


@given(key=_KEYS, before=st.text("abAB01 -_/", max_size=20), after=st.text("abAB01 -_/", max_size=20))
def test_no_part_of_any_key_is_left(key: str, before: str, after: str) -> None:
    """Whatever the key and its surroundings, no run of eight of its characters is left."""
    assume("*" not in key)
    assert not _leaks(Redactor((key,)).clean(before + key + after), key)


@given(
    key=_KEYS,
    texts=st.lists(st.one_of(st.text("abAB01 -_/", max_size=5), st.none()), max_size=8),
    cut=st.integers(1, 9),
)
def test_pieces_hide_what_the_whole_would(key: str, texts: list[str | None], cut: int) -> None:
    """However a text is cut, no part of the key comes out; a text without it comes out unchanged."""
    text = "".join(key if part is None else part for part in texts)
    redactor = PieceRedactor(Redactor((key,)))
    shown = [redactor.push(text[at : at + cut]) for at in range(0, len(text), cut)]
    result = "".join(shown) + redactor.flush()
    assert not _leaks(result, key)
    if not _leaks(text.lower(), key.lower()) and Redactor((key,)).mask(text) == text:
        assert result == text


@pytest.mark.parametrize(
    "reply",
    [
        status(401, body=json.dumps({"error": {"message": f"wrong key {KEY}"}}).encode()),
        status(400, body=f"Authorization: Bearer {KEY[:20]}".encode()),
        status(302, f"Location: https://u:{KEY}@evil.example/{KEY}?k={KEY}\r\n"),
        HEAD + b"data: " + KEY.encode() + b"\n\n",
        HEAD + event("", error={"message": "x" * 180 + KEY}),
        HEAD + event(None, KEY),
        HEAD.replace(b"text/event-stream", b"text/html-" + KEY.encode()),
        HEAD.replace(b"Connection", b"Content-Encoding: " + KEY.encode() + b"\r\nConnection"),
        b"HTTP/1.1 200 OK\r\nBad " + KEY.encode() + b"\r\n\r\n",
        status(503, f"Retry-After: {KEY}\r\n", body=json.dumps({"detail": KEY}).encode()),
    ],
)
def test_an_echo_is_in_no_error_and_in_nothing_behind_it(ask, reply: bytes) -> None:
    """Neither the error nor anything that caused it, as a traceback would print it, holds part of the key."""
    with hostile_cloud(send(reply)) as server, pytest.raises(CloudError) as caught:
        ask(server.url, environment={"OPENAI_API_KEY": KEY})
    linked: BaseException | None = caught.value
    while linked is not None:
        assert not _leaks(str(linked)) and not _leaks(repr(linked))
        linked = linked.__cause__ or linked.__context__


def test_an_echo_in_an_answer_is_masked(ask) -> None:
    """Text in pieces, thinking, model name and finish reason come without the key."""
    pieces = [KEY[at : at + 3] for at in range(0, len(KEY), 3)]
    deltas = b"".join(event(piece, model=KEY) for piece in ("it is ", *pieces, ", I think"))
    thoughts = b"".join(
        b'data: {"choices":[{"delta":{"reasoning":"%s"}}]}\n\n' % piece.encode() for piece in pieces
    )
    with hostile_cloud(send(HEAD + thoughts + deltas + event(None, f"stop {KEY}", model=KEY))) as server:
        result = ask(server.url, environment={"OPENAI_API_KEY": KEY})
    assert result.text == "it is ***, I think" and result.thinking == "***"
    assert (result.model, result.finish_reason) == ("***", "stop ***")


@pytest.mark.parametrize("key", ["none", "placeholder", "EMPTY"])
def test_a_word_instead_of_a_key_stays_in_answers(ask, key: str) -> None:
    """Where any word does for a key, answers and names that hold the word are left alone."""
    with hostile_cloud(send(HEAD + event(f"There is {key} left", "stop", model=key))) as server:
        result = ask(server.url, environment={"OPENAI_API_KEY": key})
    assert (result.text, result.model) == (f"There is {key} left", key)


def test_an_error_without_secrets_keeps_its_cause(ask) -> None:
    """Only what held a secret is cut off; other errors keep what caused them."""
    with pytest.raises(CloudUnavailableError) as caught:
        ask("http://127.0.0.1:1/v1", environment={"OPENAI_API_KEY": KEY})
    assert caught.value.__cause__ is not None
