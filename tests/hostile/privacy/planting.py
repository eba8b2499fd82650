"""Invented secrets, each of its own, in many spellings, and where in a request one can be put.

Check digits are computed here once more, from the rules and not by the code that is tested.
"""

from __future__ import annotations

import html
import json
import random
import string
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from urllib.parse import unquote_plus

_ALNUM = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Secret:
    """`text` is how it is written; `core`: letters and digits by which it is known wherever it turns up."""

    kind: str
    text: str
    core: str


@dataclass(frozen=True)
class Plant:
    """A secret, the field that it is put into, and the way on which the request goes."""

    secret: Secret
    field: str
    way: str


def compact(text: str) -> str:
    """Letters and digits of a text, in compatibility form and lower case."""
    return "".join(c for c in unicodedata.normalize("NFKC", text) if c.isalnum()).lower()


def readings(data: bytes) -> Iterator[str]:
    """What a reader may take captured bytes for: as they are, and URL, HTML and JSON decoded."""
    text = data.decode("utf-8", "replace")
    yield text
    yield unquote_plus(text)
    yield html.unescape(text)
    body = text.partition("\r\n\r\n")[2]
    try:
        parsed = json.loads(body)
    except ValueError:
        return
    yield json.dumps(parsed, ensure_ascii=False)
    for value in _strings(parsed):
        yield value
        # JSON in JSON
        if "\\" in value:
            yield json.loads(f'"{value}"') if _is_json(f'"{value}"') else value


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _strings(key)
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _letters(rng: random.Random, count: int, alphabet: str = _ALNUM) -> str:
    # with a digit and a letter, as what is drawn at random has
    while True:
        made = "".join(rng.choice(alphabet) for _ in range(count))
        if any(c.isdigit() for c in made) and any(c.isalpha() for c in made):
            return made


def _card(rng: random.Random) -> str:
    head = rng.choice(("4", "51", "55", "2221", "6011", "62", "3530"))
    digits = head + "".join(rng.choice(string.digits) for _ in range(15 - len(head)))
    doubled = sum(sum(divmod(int(d) * (2 - i % 2), 10)) for i, d in enumerate(digits))
    return digits + str(-doubled % 10)


def _iban(rng: random.Random) -> str:
    digits = "".join(rng.choice(string.digits) for _ in range(18))
    return f"DE{98 - int(digits + '131400') % 97:02d}{digits}"


def _chinese_id(rng: random.Random) -> str:
    born = f"{rng.randint(1950, 2010)}{rng.randint(1, 12):02d}{rng.randint(1, 28):02d}"
    digits = f"{rng.choice((110105, 310101, 440305))}{born}{rng.randint(0, 999):03d}"
    total = sum(int(d) * (2 ** (17 - i) % 11) for i, d in enumerate(digits))
    return digits + "0123456789X"[(12 - total % 11) % 11]


def _spaced(text: str, width: int, gap: str) -> str:
    return gap.join(text[at : at + width] for at in range(0, len(text), width))


def wide(text: str) -> str:
    """Full-width forms."""
    return "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in text)


_NUMBER_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda n: n,
    lambda n: _spaced(n, 4, " "),
    lambda n: _spaced(n, 4, "-"),
    lambda n: _spaced(n, 4, "\u00a0"),
    lambda n: _spaced(n, 1, "\u200b"),
    wide,
    lambda n: f"号码{n}。",
    lambda n: f"номер{n}",
    lambda n: f'{{"number": "{n}"}}',
    lambda n: f"NUMBER={n}",
)
#: identity numbers are not written in groups of four
_ID_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda n: n,
    lambda n: n.lower(),
    lambda n: f"{n[:6]} {n[6:14]} {n[14:]}",
    lambda n: _spaced(n, 1, "\u200b"),
    wide,
    lambda n: f"身份证{n}，谢谢",
)
_MAIL_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda m: m,
    lambda m: f"邮箱{m}。",
    lambda m: m.replace("@", " (at) "),
    lambda m: m.replace("@", "\\u0040"),
    lambda m: m.replace("@", "%40"),
    lambda m: m.replace("@", "&#64;"),
    wide,
    lambda m: _spaced(m, 2, "\u00ad"),
)
_PASSWORD_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda p: f"my password is {p}",
    lambda p: f"DB_PASSWORD={p}",
    lambda p: f'{{"password": "{p}"}}',
    lambda p: f'{{\\"passwd\\":\\"{p}\\"}}',
    lambda p: f"密码：{p}",
    lambda p: f"пароль: {p}",
    lambda p: f"pa\u200bssword: {p}",
    lambda p: wide(f"password={p}"),
    lambda p: f"postgres://app:{p}@db.example/x",
    lambda p: f"Pwd={p};",
    lambda p: f"<password>{p}</password>",
    lambda p: f"api_key: {p}",
    lambda p: f"--token {p}",
)
_HEADS = (
    "sk" + "-",
    "gh" + "p_",
    "github" + "_pat_",
    "gl" + "pat-",
    "h" + "f_",
    "np" + "m_",
    "s" + "k_live_",
)
_KEY_SPELLINGS: tuple[Callable[[str], str], ...] = (
    lambda k: k,
    lambda k: f"密钥{k}",
    lambda k: f"KEY={k}",
    lambda k: _spaced(k, 3, "\u200b"),
    wide,
    lambda k: f"Authorization: Bearer {k}",
)


def secrets(rng: random.Random) -> Iterator[Secret]:
    """Without end, kind by kind and spelling by spelling."""
    turn = 0
    while True:
        card, account, person = _card(rng), _iban(rng), _chinese_id(rng)
        name = _letters(rng, 12, string.ascii_lowercase + string.digits)
        word, body = _letters(rng, 14), _letters(rng, 40)
        yield Secret("card", _pick(_NUMBER_SPELLINGS, turn)(card), card)
        yield Secret("iban", _pick(_NUMBER_SPELLINGS, turn)(account), account.lower())
        yield Secret("id", _pick(_ID_SPELLINGS, turn)(person), person.lower())
        yield Secret("mail", _pick(_MAIL_SPELLINGS, turn)(f"{name}@mail.example"), name)
        yield Secret("key", _pick(_KEY_SPELLINGS, turn)(_HEADS[turn % len(_HEADS)] + body), body.lower())
        yield Secret("password", _pick(_PASSWORD_SPELLINGS, turn)(word), word.lower())
        turn += 1


def _pick(spellings: tuple[Callable[[str], str], ...], turn: int) -> Callable[[str], str]:
    return spellings[turn % len(spellings)]


def chat(field: str, secret: str, question: str) -> list[dict]:
    """The messages of a chat that asks `question`, with the secret in one of its fields."""
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": question},
    ]
    system, user, assistant, last = turns
    if field in ("content", "system", "first turn", "answer"):
        places = {"content": last, "system": system, "first turn": user, "answer": assistant}
        places[field]["content"] += f" {secret} "
    elif field == "part":
        last["content"] = [{"type": "text", "text": question}, {"type": "text", "text": f" {secret} "}]
    elif field == "part's own field":
        last["content"] = [{"type": "text", "text": question, "image_url": {"url": secret}}]
    elif field in ("role", "name", "tool_call_id", "reasoning_content", "thinking", "metadata", "refusal"):
        (assistant if field == "reasoning_content" else user)[field] = secret
    elif field == "key":
        user[secret] = "x"
    elif field == "nested":
        user["more"] = {"list": [{"deep": secret}]}
    elif field == "tool_calls":
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": secret}}
        assistant["tool_calls"] = [call]
    return turns


#: where in a message a secret can be
MESSAGE_FIELDS = (
    *(
        "content",
        "system",
        "first turn",
        "answer",
        "part",
        "part's own field",
        "role",
        "name",
        "tool_call_id",
    ),
    *("reasoning_content", "thinking", "metadata", "refusal", "key", "nested", "tool_calls"),
)
