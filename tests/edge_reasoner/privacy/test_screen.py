"""A screen reads every text of a request, and says why without repeating any of it."""

from __future__ import annotations

import json

import pytest
from support.private_spellings import CARD, MAIL

from edge_reasoner.errors import InputError, PrivacyVetoError
from edge_reasoner.privacy.screen import PRIVATE_KINDS, Screen

SCREEN = Screen()
SECRET = "hunter2x9"


def _body(**changes) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True, **changes}


@pytest.mark.parametrize(
    "body",
    [
        _body(model=f"password={SECRET}"),
        _body(stop=["ok", f"password={SECRET}"]),
        _body(messages=[{"role": f"password={SECRET}", "content": "hi"}]),
        _body(messages=[{"role": "user", "content": "hi", "name": f"password={SECRET}"}]),
        _body(messages=[{"role": "user", "content": [{"type": "text", "text": f"password={SECRET}"}]}]),
        _body(messages=[{"role": "user", "content": [{"image_url": {"url": f"password={SECRET}"}}]}]),
        _body(
            messages=[{"role": "user", "content": f"password={SECRET}"}]
            + [{"role": "user", "content": "x"}] * 9
        ),
        _body(
            messages=[
                {"content": "", "tool_calls": [{"function": {"arguments": f'{{"password":"{SECRET}"}}'}}]}
            ]
        ),
        _body(metadata={"password": SECRET}),
        _body(metadata={f"password={SECRET}": 1}),
        _body(metadata={f"password={SECRET}": None}),
        _body(metadata={f"password={SECRET}": {}}),
        _body(metadata={f"password={SECRET}": [[]]}),
        _body(user=MAIL),
        _body(more=int(CARD)),
        _body(more=float(CARD)),
        _body(more=[[[{"deep": [CARD]}]]]),
    ],
)
def test_every_key_and_value_is_read(body: dict) -> None:
    """Wherever it stands; the reason names the kind and nothing else, and an error is one clear line."""
    why = SCREEN.reasons(body)
    assert len(why) == 1 and why[0].startswith("private: the prompt holds a")
    with pytest.raises(PrivacyVetoError) as caught:
        SCREEN.checked(json.dumps(body).encode())
    assert str(caught.value) == why[0] and SECRET not in why[0]


def test_what_is_let_pass_is_what_was_read() -> None:
    """The bytes themselves; escapes of JSON hide nothing."""
    data = json.dumps(_body()).encode()
    assert SCREEN.checked(data) == data
    hidden = json.dumps(_body(user=MAIL)).replace("@", "\\u0040").encode()
    with pytest.raises(PrivacyVetoError, match="e-mail"):
        SCREEN.checked(hidden)


def test_a_name_that_comes_twice_is_refused() -> None:
    """Only one of the two would be read here, and perhaps the other one there."""
    with pytest.raises(InputError, match="two fields"):
        SCREEN.checked(b'{"messages": [], "user": "ann@example.com", "user": "x"}')
    with pytest.raises(InputError, match="object"):
        SCREEN.checked(b"[]")


def test_texts_are_not_read_across_their_borders() -> None:
    """Two fields are two texts: their ends do not make a number or a password together."""
    assert not SCREEN.reasons(_body(stop=["4111 1111", "1111 1111", "password:", "swordfish9"]))


def test_length_comes_first() -> None:
    """What is too long is refused before any pattern reads it, in messages and elsewhere."""

    class Unread(str):
        def translate(self, table):
            raise AssertionError("read")

        isascii = translate

    screen = Screen(max_chars=100)
    assert "exceeds the 100" in screen.reasons({"messages": [{"content": Unread("a" * 101)}]})[0]
    assert "exceeds the 100" in screen.reasons({"messages": [], "stop": Unread("a" * 70_000)})[0]
    with pytest.raises(PrivacyVetoError, match="exceeds"):
        screen.checked(b"x" * 1_000_000)
    assert not screen.reasons({"messages": [{"role": "user", "content": "a" * 100}]})


def test_the_owner_chooses() -> None:
    """Kinds can be left out, patterns added (also for folded text), and everything forbidden."""
    mail = _body(user=MAIL)
    assert not Screen(kinds=tuple(kind for kind in PRIVATE_KINDS if kind != "e-mail address")).reasons(mail)
    own = Screen(kinds=(), patterns={"project": r"Falcon-\d+"})
    assert own.reasons(_body(user="Falcon-7")) == ("private: the prompt holds a project",)
    assert own.matches("Ｆalc\u200bon－７") == ("project",) and not own.matches(MAIL)
    assert Screen(local_only=True).reasons(_body()) == ("the policy is local_only",)
    with pytest.raises(InputError, match=r"private_kinds: 'iban' is not known; there are .*IBAN"):
        Screen(kinds=("iban",))
    with pytest.raises(InputError, match="policy: private pattern 'x'"):
        Screen(patterns={"x": "("})
