"""Cards, accounts and identity numbers, told from other numbers by their shape and check digits.

Every pattern has a bounded length, so that a search takes time linear in the text. Borders are those of ASCII
letters and digits: a number may touch letters of other scripts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from edge_reasoner.privacy import checksums
from edge_reasoner.privacy.fold import folded

_Check = Callable[[str], bool]

#: fewer digits than this are none of these numbers
_MANY_DIGITS = re.compile(r"[0-9](?:[^0-9]{0,4}[0-9]){5}")
_DIGITS = re.compile(r"[0-9]+")
_GAP = re.compile(r"[ \t\r\n._/·-]{1,3}")
_SPACED = re.compile(r"(?<![0-9A-Za-z])[0-9](?:[ ._·-][0-9Xx]){11,24}(?![0-9A-Za-z])")
_SEPARATORS = re.compile(r"[^0-9A-Za-z]+")
#: how cards are grouped
_CARD_SHAPES = (
    *((4, 4, 4, 4), (4, 4, 4, 4, 3), (4, 4, 4, 4, 1), (4, 6, 5), (4, 6, 4), (4, 4, 4, 1), (4, 3, 3, 3)),
    *((8, 8), (6, 13), (6, 10), (4, 12), (12, 4), (2,) * 8, (5, 5, 5)),
)
_FOURS = 4
_MAX_FEW_FOURS, _MAX_FOURS = 8, 64
_MAX_WORD_CHARS = 24


def is_spaced_apart(text: str) -> str:
    """`text` with digits that stand one by one (`4 1 1 1 …`) put together."""
    return _SPACED.sub(lambda match: _SEPARATORS.sub("", match[0]), text)


def has_card(text: str) -> bool:
    """Whether a folded text holds the number of a payment card."""
    if not _MANY_DIGITS.search(text):
        return False
    text = is_spaced_apart(text)
    return _NAMED_CARD.search(text) is not None or any(_card_in(text, run) for run in _runs(text))


def has_iban(text: str) -> bool:
    """Whether a folded text holds an account number after ISO 13616."""
    for match in _IBAN.finditer(text):
        compact = _SEPARATORS.sub("", match[1]).upper()
        whole = compact[: checksums.IBAN_CHARS.get(compact[:2], 0)]
        digits = sum(map(str.isdigit, whole))
        if checksums.is_iban(whole) and 2 * digits > len(whole):
            return True
    return _NAMED_IBAN.search(text) is not None


def has_national_id(text: str) -> bool:
    """Whether a folded text holds an identity number of one of the known kinds."""
    if not _MANY_DIGITS.search(text):
        return False
    text = is_spaced_apart(text)
    for pattern, check in _SHAPED:
        if any(check(_SEPARATORS.sub("", match[0])) for match in pattern.finditer(text)):
            return True
    for pattern, check in _LABELLED:
        if any(_labelled(match[1], check) for match in pattern.finditer(text)):
            return True
    return False


def _runs(text: str) -> Iterator[list[tuple[int, int]]]:
    """Groups of digits that follow each other with nothing but separators between."""
    run: list[tuple[int, int]] = []
    for match in _DIGITS.finditer(text):
        if run and not _GAP.fullmatch(text, run[-1][1], match.start()):
            yield run
            run = []
        run.append(match.span())
    if run:
        yield run


def _card_in(text: str, run: list[tuple[int, int]]) -> bool:
    sizes = [end - start for start, end in run]
    block_start, block_end = 0, 0
    for at, size in enumerate(sizes):
        if 13 <= size <= 19 and _is_card(text, run[at : at + 1]):
            return True
        if at >= block_end:
            block_start = block_end = at
            while block_end < len(sizes) and sizes[block_end] == _FOURS:
                block_end += 1
        for shape in _CARD_SHAPES:
            if size != shape[0] or tuple(sizes[at : at + len(shape)]) != shape:
                continue
            if shape[:3] == (4, 4, 4) and not _may_begin(at - block_start, block_end - block_start):
                continue
            if size == 2 and len(sizes) != len(shape):
                continue
            if _is_card(text, run[at : at + len(shape)]):
                return True
    return False


def _may_begin(at: int, count: int) -> bool:
    """A card among `count` groups of four, `at` their beginning: long rows of numbers are no cards."""
    return count <= _MAX_FEW_FOURS or (count <= _MAX_FOURS and count % _FOURS == 0 and at % _FOURS == 0)


def _is_card(text: str, groups: list[tuple[int, int]]) -> bool:
    start, end = groups[0][0], groups[-1][1]
    if text.count("\n", start, end) > 1 or not _is_free(text, start, end, decimal=len(groups) == 1):
        return False
    return checksums.is_card("".join(text[first:last] for first, last in groups))


def _is_free(text: str, start: int, end: int, *, decimal: bool) -> bool:
    """Whether a number is not a part of something longer: a hash, an identifier, a decimal fraction."""
    before, after = text[max(0, start - _MAX_WORD_CHARS) : start], text[end : end + _MAX_WORD_CHARS]
    left, right = re.search(r"[0-9A-Za-z]*\Z", before), re.match(r"[0-9A-Za-z]*", after)
    if any(word and word[0] and not word[0].isalpha() for word in (left, right)):
        return False
    return not (decimal and (re.search(r"[0-9]\.\Z", before) or re.match(r"\.[0-9]", after)))


def _labelled(found: str, check: _Check) -> bool:
    """Whether the number after a label passes; what follows it may be digits of something else."""
    compact = _SEPARATORS.sub("", found)
    return any(check(compact[:length]) for length in range(7, len(compact) + 1))


def _shape(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![0-9A-Za-z])(?:{pattern})(?![0-9A-Za-z])")


def _label(names: str) -> re.Pattern[str]:
    # names are looked for in folded texts
    number = r"[^0-9\n]{0,24}([0-9](?:[ ./-]{0,2}[0-9]){7,13})"
    return re.compile(f"(?:{folded(names)}){number}", re.IGNORECASE)


def _any(_: str) -> bool:
    return True


def _passport(text: str) -> bool:
    return sum(map(str.isdigit, text)) >= 5


_IBAN = re.compile(
    r"(?:(?<![0-9A-Za-z])|(?<=iban))(?=([A-Z]{2}[ .-]?[0-9][ .-]?[0-9](?:[ .\n-]{0,2}[0-9A-Z]){11,30}))",
    re.IGNORECASE,
)
#: what is called a card's or an account's number is one, whatever its check digits say
_NAMED_CARD = re.compile(
    folded(
        r"(?:(?:credit|debit|bank|visa|master)[ -]?card|card (?:no|number|nr)|kreditkarte|kartennummer"
        r"|carte bancaire|tarjeta|cartão|carta di credito|卡号|卡號|银行卡|信用卡"
        r"|カード番号|номер карты|카드 ?번호|(?<![a-z])pan)"
        r"[^0-9\n]{0,16}[0-9](?:[ ._-]{0,2}[0-9]){12,18}(?![0-9])"
    ),
    re.IGNORECASE,
)
_NAMED_IBAN = re.compile(
    r"iban[^0-9a-z\n]{0,4}(?:(?:is|no|nr|ist)[^0-9a-z\n]{1,3})?[a-z]{2}[ .-]?[0-9]{2}(?:[ .-]?[0-9]){10}",
    re.IGNORECASE,
)
_MONTH, _DAY = "(?:0[1-9]|1[0-2])", "(?:0[1-9]|[12][0-9]|3[01])"

#: shapes that are told from other numbers without a label
_SHAPED: tuple[tuple[re.Pattern[str], _Check], ...] = (
    (
        re.compile(
            rf"(?<![0-9])[1-9][0-9]{{5}}[ -]?(?:18|19|20)[0-9]{{2}}[ -]?{_MONTH}[ -]?{_DAY}[ -]?"
            r"[0-9]{3}[0-9Xx](?![0-9])"
        ),
        checksums.chinese_id,
    ),
    (re.compile(r"(?<![0-9A-Za-z-])[0-9]{3}-[0-9]{2}-[0-9]{4}(?!-?[0-9A-Za-z])"), checksums.social_security),
    (
        re.compile(r"(?<![0-9A-Za-z])(?<![0-9][ -])[2-9][0-9]{3}([ -])[0-9]{4}\1[0-9]{4}(?![ -]?[0-9])"),
        checksums.verhoeff,
    ),
    (_shape(r"[0-9]{3}\.[0-9]{3}\.[0-9]{3}-[0-9]{2}"), checksums.cpf),
    (
        _shape(r"[0-9]{8}[ -]?[A-HJ-NP-TV-Z]|[0-9]{2}\.[0-9]{3}\.[0-9]{3}-?[A-HJ-NP-TV-Z]"),
        checksums.spanish_id,
    ),
    (_shape(r"[XYZ][ -]?[0-9]{7}[ -]?[A-HJ-NP-TV-Z]"), checksums.spanish_id),
    (
        _shape(
            r"[12] ?[0-9]{2} ?(?:0[1-9]|1[0-2]|[2-4][0-9]) ?(?:[0-9]{2}|2[AB]) ?[0-9]{3} ?[0-9]{3} ?[0-9]{2}"
        ),
        checksums.french_nir,
    ),
    (
        _shape(r"[A-Z]{3} ?[A-Z]{3} ?[0-9]{2}[A-EHLMPRST][0-9]{2} ?[A-Z][0-9]{3}[A-Z]"),
        checksums.codice_fiscale,
    ),
    # Great Britain's has no check digit, but a shape of its own
    (_shape(r"[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?[0-9]{2} ?[0-9]{2} ?[0-9]{2} ?[A-D]"), _any),
    (_shape(r"756[. -]?[0-9]{4}[. -]?[0-9]{4}[. -]?[0-9]{2}"), checksums.ean13),
    # Korea's is checked by its date alone since 2020
    (re.compile(rf"(?<![0-9A-Za-z-])[0-9]{{2}}{_MONTH}{_DAY}-[1-8][0-9]{{6}}(?![0-9A-Za-z-])"), _any),
    (_shape(r"[STFGM][0-9]{7}[A-Z]"), checksums.singapore_id),
    (_shape(r"[A-Z][12][0-9]{8}"), checksums.taiwan_id),
)
#: numbers that are told by the words before them
_LABELLED: tuple[tuple[re.Pattern[str], _Check], ...] = (
    (
        re.compile(folded(r"(?:身份证|身份證|公民身份)[^0-9\n]{0,12}([0-9]{17}[0-9Xx]|[0-9]{15})(?![0-9])")),
        _any,
    ),
    (_label(r"ssn|social[ -]security|社会安全"), checksums.social_security),
    (_label(r"aadhaa?r|uidai|आधार"), checksums.verhoeff),
    (_label(r"cpf"), checksums.cpf),
    (_label(r"steuer-?(?:id|ident)|\bidnr|tax id|steuerliche ident"), checksums.german_tax_id),
    (_label(r"\bbsn|burgerservice|sofinummer"), checksums.elfproef),
    (_label(r"pesel"), checksums.pesel),
    (_label(r"\bnhs"), checksums.nhs_number),
    (_label(r"\bsin\b|social insurance"), lambda digits: len(digits) == 9 and checksums.luhn(digits)),
    (
        re.compile(
            folded(
                r"(?:passport|reisepass|passeport|pasaporte|护照|護照|パスポート|паспорт)[^0-9A-Z\n]{0,4}"
                r"(?:(?:no|nr|number|nummer|numero|is|号码?|番号|номер)[^0-9A-Z\n]{1,4}){0,2}"
                r"([A-Z]{0,2}[0-9]{6,9}|[0-9]{2} ?[0-9]{2} ?[0-9]{6})(?![0-9])"
            ),
            re.IGNORECASE,
        ),
        _passport,
    ),
)
