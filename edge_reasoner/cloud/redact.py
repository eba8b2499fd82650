"""Keeps secrets out of every text that leaves a cloud client, whatever an endpoint echoes.

A secret is found whole or in part (`PART_CHARS` of its characters in a row), in any letter case, and as its
URL-encoded, base64 and hexadecimal form. In errors and logs it is found as well where line breaks, spaces or
characters that show nothing stand within it, and where some or all of it is escaped (`%73`, `\\u0073`,
`&#115;`). What is found becomes `***`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from urllib.parse import quote

from edge_reasoner.errors import CloudError
from edge_reasoner.privacy.fold import unescaped

#: this many characters of a secret in a row are recognizable
PART_CHARS = 8
#: of a secret's start, this many characters may be shown before it is clear that it is one
_HELD_CHARS = 3
_MAX_CAUSES = 32
_MASK = "***"
_USER = re.compile(r"(?<=://)[^/\s]*@")
#: what may stand within a secret that was wrapped: spaces, escaped ones, marks, format characters
_WITHIN = re.compile(
    r"[\s\x00-\x1f\x7f-\xa0\xad\u034f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufffd]"
    r"|\\[nrt]|</?[a-z]{1,4} ?/?>",
    re.IGNORECASE,
)
_LOWER = str.maketrans({chr(code): chr(code + 32) for code in range(ord("A"), ord("Z") + 1)})


class Redactor:
    """Replaces secrets in texts. Thread-safe: it never changes."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        """Empty secrets are ignored; one shorter than `PART_CHARS` is found as a whole word only."""
        forms = {form.translate(_LOWER) for secret in secrets for form in _forms(secret)}
        self._forms = tuple(form for form in forms if len(form) >= PART_CHARS)
        self._parts = frozenset(
            form[at : at + PART_CHARS] for form in self._forms for at in range(len(form) - PART_CHARS + 1)
        )
        self._starts = frozenset(
            form[at : at + _HELD_CHARS] for form in self._forms for at in range(len(form) - _HELD_CHARS + 1)
        )
        short = sorted((re.escape(form) for form in forms if len(form) < PART_CHARS), key=len, reverse=True)
        self._short = re.compile(rf"(?<![a-z0-9])(?:{'|'.join(short)})(?![a-z0-9])") if short else None

    def clean(self, text: str) -> str:
        """`text` without secrets, wrapped and escaped ones too, and without users and passwords in URLs."""
        text = self._mask_wrapped(_USER.sub(_MASK + "@", text))
        decoded = unescaped(text)
        return text if decoded == text or not self._holds(decoded) else self._mask_wrapped(decoded)

    def _holds(self, text: str) -> bool:
        return self._mask_wrapped(text) != text

    def _mask_wrapped(self, text: str) -> str:
        """`text` without secrets, whatever stands between their characters."""
        text = self.mask(text)
        kept: list[int] = []
        at = 0
        for match in _WITHIN.finditer(text):
            kept += range(at, match.start())
            at = match.end()
        if not at or not self._parts:
            return text
        kept += range(at, len(text))
        spans = [
            (kept[start], kept[end - 1] + 1)
            for start, end, hidden in self.runs("".join(text[place] for place in kept))
            if hidden and kept[end - 1] - kept[start] >= end - start
        ]
        for start, end in reversed(spans):
            text = text[:start] + _MASK + text[end:]
        return text

    def mask(self, text: str) -> str:
        """`text` without secrets."""
        return "".join(_MASK if hidden else text[start:end] for start, end, hidden in self.runs(text))

    def runs(self, text: str) -> list[tuple[int, int, bool]]:
        """`text` cut into (start, end, whether it is part of a secret)."""
        lower = text.translate(_LOWER)
        spans = [match.span() for match in self._short.finditer(lower)] if self._short else []
        if self._parts:
            found = (
                at for at in range(len(lower) - PART_CHARS + 1) if lower[at : at + PART_CHARS] in self._parts
            )
            spans += [(at, at + PART_CHARS) for at in found]
        runs: list[tuple[int, int, bool]] = []
        end = 0
        for start, stop in sorted(spans):
            if start > end:
                runs.append((end, start, False))
            if runs and runs[-1][2] and start <= end:
                runs[-1] = (runs[-1][0], max(end, stop), True)
            else:
                runs.append((start, stop, True))
            end = max(end, stop)
        if end < len(text):
            runs.append((end, len(text), False))
        return runs

    def open_chars(self, text: str) -> int:
        """Length of the longest end of `text` that is part of a secret and may go on."""
        lower = text.translate(_LOWER)
        if not self._forms or lower[-_HELD_CHARS:] not in self._starts:
            return 0
        count = _HELD_CHARS
        while count < len(lower) and any(lower[-count - 1 :] in form for form in self._forms):
            count += 1
        return count


class PieceRedactor:
    """A text that arrives in pieces, without secrets, wherever it is cut.

    An end that may be part of a secret is held back until it is clear. At most two characters of a secret's
    start are given away.
    """

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._given = ""
        self._held = ""

    def push(self, piece: str) -> str:
        """Adds text; returns what may be shown of it."""
        self._held += piece
        return self._release(self._redactor.open_chars(self._given + self._held))

    def flush(self) -> str:
        """The rest, at the end of the text."""
        return self._release(0)

    def _release(self, keep: int) -> str:
        # what was given before is looked at again: a secret may have begun in it
        text = self._given + self._held
        cut = max(len(self._given), len(text) - keep)
        runs = self._redactor.runs(text)
        cut = max([cut, *(end for start, end, hidden in runs if hidden and start < cut)])
        shown = ""
        for start, end, hidden in (
            (start, min(end, cut), hidden) for start, end, hidden in runs if start < cut
        ):
            if end > len(self._given):
                shown += _MASK if hidden else text[max(start, len(self._given)) : end]
        self._held = text[cut:]
        self._given = text[max(0, cut - _HELD_CHARS + 1) : cut]
        return shown


def is_telling(secret: str) -> bool:
    """Whether a secret is one by its looks: not a short word that stands in where no key is needed."""
    return len(secret) >= PART_CHARS and not secret.isalpha()


def shown_url(url: str) -> str:
    """A URL as it may be shown: without user, password, query and fragment, at most 200 characters."""
    place = re.split(r"[?#]", " ".join(url.split()), maxsplit=1)[0]
    scheme, colon, rest = place.rpartition("://")
    return f"{scheme}{colon}{rest.rpartition('@')[2]}"[:200]


def scrubbed(error: CloudError, redactor: Redactor) -> CloudError:
    """The error, if neither it nor what caused it holds a secret; else a copy that does not, alone."""
    linked: BaseException | None = error
    for _ in range(_MAX_CAUSES):
        if linked is None:
            return error
        if redactor.clean(str(linked)) != str(linked):
            break
        linked = linked.__cause__ or linked.__context__
    return type(error)(redactor.clean(str(error)))


def _forms(secret: str) -> set[str]:
    if not secret:
        return set()
    data = secret.encode("utf-8", "replace")
    forms = {secret, quote(secret, safe="")}
    if len(secret) >= PART_CHARS:
        forms.add(data.hex())
        # wherever it stands in what was encoded, all but its edges come out the same
        for before in range(3):
            coded = base64.b64encode(b"\0" * before + data).decode()
            forms |= {
                form[4 if before else 0 :].rstrip("=")[:-1] for form in (coded, coded.translate(_URL_SAFE))
            }
    return {form for form in forms if form}


_URL_SAFE = str.maketrans("+/", "-_")
