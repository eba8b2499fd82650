"""Text as a detector reads it: one spelling for what a reader takes for the same.

Time is linear in the text: each character is looked up by itself. (Unicode's own normalization sorts the
marks of one letter, which takes quadratic time where a text has many of them.)
"""

from __future__ import annotations

import re
import unicodedata

#: no character becomes longer than this: some stand for a whole phrase
_MAX_FOLDED_CHARS = 4
_TAGS = range(0xE0020, 0xE007F)
#: letters that show nothing: Hangul fillers
_INVISIBLE = "\u115f\u1160\u3164\uffa0"
_NAMED = {
    **dict.fromkeys("“”„‟«»「」『』〝〞〟", '"'),
    **dict.fromkeys("‘’‚‛‹›`´", "'"),
    **dict.fromkeys("−⁃", "-"),
    **dict.fromkeys("•∙⋅・", "·"),
    **dict.fromkeys("\x85\u2028\u2029", "\n"),
    **dict.fromkeys("→⇒➜➔", "="),
    "\u2800": " ",
}
_CONTROLS: dict[int, str | None] = dict.fromkeys((*range(9), *range(14, 32), 127))

_ROUNDS = 2
_ESCAPE = re.compile(
    r"\\u([0-9a-f]{4})|((?:\\x[0-9a-f]{2})+|(?:%[0-9a-f]{2})+)|&#x([0-9a-f]{1,6});|&#([0-9]{1,7});"
    r"|&(quot|apos|amp|commat|nbsp|equals|colon|lt|gt);",
    re.IGNORECASE,
)
_ENTITIES = {
    **{"quot": '"', "apos": "'", "amp": "&", "commat": "@", "nbsp": " ", "equals": "=", "colon": ":"},
    **{"lt": "<", "gt": ">"},
}


def folded(text: str) -> str:
    """`text` in compatibility form (NFKD), letter by letter, without marks.

    Digits of every script are ASCII digits, spaces and dashes of every width are " " and "-"; format
    characters, fillers and control characters are left out; letters that exist as invisible tags are shown.
    """
    if text.isascii():
        return text.translate(_CONTROLS)
    table: dict[int, str | None] = {ord(c): _plain(c) for c in set(text) if not c.isascii()}
    return text.translate(table | _CONTROLS)


def views(text: str) -> tuple[str, ...]:
    """`text` folded, and once more with its escapes decoded if it has any: `\\u0040`, `%40`, `&#64;`."""
    plain = folded(text)
    decoded = folded(unescaped(plain))
    return (plain,) if decoded == plain else (plain, decoded)


def unescaped(text: str) -> str:
    """`text` with `\\u0040`, `\\x40`, `%40`, `&#64;` and the like decoded, twice at most."""
    for _ in range(_ROUNDS):
        if not _ESCAPE.search(text):
            break
        text = _ESCAPE.sub(_unescaped, text)
    return text


def _plain(character: str) -> str:
    named = _NAMED.get(character)
    if named is not None:
        return named
    code = ord(character)
    if code in _TAGS:
        return chr(code - _TAGS.start + 0x20)
    parts = unicodedata.normalize("NFKD", character)[:_MAX_FOLDED_CHARS]
    return "".join(_part(part) for part in parts)


def _part(part: str) -> str:
    named = _NAMED.get(part)
    if named is not None or part.isascii():
        return part if named is None else named
    category = unicodedata.category(part)
    if category in ("Mn", "Me", "Cf", "Cc", "Cs") or part in _INVISIBLE:
        return ""
    if category == "Nd":
        return str(unicodedata.decimal(part))
    return {"Zs": " ", "Pd": "-"}.get(category, part)


def _unescaped(match: re.Match[str]) -> str:
    wide, coded, hexadecimal, number, name = match.groups()
    if name:
        return _ENTITIES[name.lower()]
    if coded:
        return bytes.fromhex(coded.lower().replace("\\x", "").replace("%", "")).decode("utf-8", "replace")
    code = int(number) if number else int(wide or hexadecimal, 16)
    return chr(code) if code < 0x110000 else ""
