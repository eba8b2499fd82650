"""The kinds of private data that are found without being told: one name and one detector each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType

from edge_reasoner.privacy.credentials import has_password, has_secret_key
from edge_reasoner.privacy.numbers import has_card, has_iban, has_national_id

#: one legal character before the sign is enough: what else the name holds does not matter
_MAIL = re.compile(
    r"(?<=[\w+.%'\"-])(?<!\bgit)@(?:xn--)?\w[\w-]{0,62}(?:\.\w[\w-]{0,62}){0,4}\.(?:xn--[\w-]{2,59}|[^\W\d_]{2,63})(?![\w(])"
)
_AT = r" {0,2}[\[({<] {0,2}(?:at|@|arroba) {0,2}[\])}>] {0,2}"
_BRACKETED_AT = re.compile(r"[\[({<] {0,2}(?:at|@|arroba)")
_DOT = r"(?: {0,2}[\[({<] {0,2}(?:dot|punkt|point|\.) {0,2}[\])}>] {0,2}| dot |\.)"
_SPELLED_MAIL = re.compile(
    r"\w(?: @ ?|@ )\w[\w-]{0,62}(?:\.[\w-]{1,63}){0,3}\.(?:com|org|net|edu|de|fr|uk|eu|cn|ru|nl|es|it)\b|"
    rf"\w{_AT}\w[\w-]{{0,62}}(?:{_DOT}\w[\w-]{{0,62}}){{1,4}}"
    r"|\w at \w[\w-]{0,62}(?: dot \w[\w-]{0,62}){0,3} dot "
    r"(?:com|org|net|edu|io|de|fr|uk|eu|info|cn|ru|nl|es|it|ch|at)\b",
    re.IGNORECASE,
)


def has_mail_address(text: str) -> bool:
    """Whether a folded text holds an e-mail address, also as `name (at) example (dot) org`."""
    if "@" in text and _MAIL.search(text):
        return True
    lowered = text.lower()
    spelled = "@" in text or _BRACKETED_AT.search(lowered) or (" at " in lowered and " dot " in lowered)
    return bool(spelled) and _SPELLED_MAIL.search(text) is not None


#: name → whether a folded text (`fold.py`) holds it, in time linear in the text
KINDS: Mapping[str, Callable[[str], bool]] = MappingProxyType(
    {
        "e-mail address": has_mail_address,
        "payment card": has_card,
        "IBAN": has_iban,
        "national id number": has_national_id,
        "secret key": has_secret_key,
        "password": has_password,
    }
)
