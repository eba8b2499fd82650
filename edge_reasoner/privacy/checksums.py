"""Check digits of cards, accounts and identity numbers, after their issuers' rules; no separators."""

from __future__ import annotations

#: lengths after ISO 13616's registry
IBAN_CHARS = {
    **dict.fromkeys(("NO",), 15),
    **dict.fromkeys(("BE",), 16),
    **dict.fromkeys(("DK", "FI", "FO", "GL", "NL", "SD", "FK"), 18),
    **dict.fromkeys(("MK", "SI"), 19),
    **dict.fromkeys(("AT", "BA", "EE", "KZ", "LT", "LU", "XK", "MN"), 20),
    **dict.fromkeys(("CH", "CR", "HR", "LI", "LV"), 21),
    **dict.fromkeys(("BG", "BH", "DE", "GB", "GE", "IE", "ME", "RS", "VA"), 22),
    **dict.fromkeys(("AE", "GI", "IL", "IQ", "TL", "OM", "SO"), 23),
    **dict.fromkeys(("AD", "CZ", "ES", "MD", "PK", "RO", "SA", "SE", "SK", "TN", "VG"), 24),
    **dict.fromkeys(("PT", "ST", "LY"), 25),
    **dict.fromkeys(("IS", "TR"), 26),
    **dict.fromkeys(("FR", "GR", "IT", "MC", "MR", "SM", "BI", "DJ"), 27),
    **dict.fromkeys(("AL", "AZ", "BY", "CY", "DO", "EG", "GT", "HU", "LB", "PL", "SV", "NI"), 28),
    **dict.fromkeys(("BR", "PS", "QA", "UA"), 29),
    **dict.fromkeys(("JO", "KW", "MU", "YE"), 30),
    **dict.fromkeys(("MT", "SC"), 31),
    **dict.fromkeys(("LC",), 32),
    **dict.fromkeys(("RU",), 33),
}

_D5 = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    (1, 2, 3, 4, 0, 6, 7, 8, 9, 5),
    (2, 3, 4, 0, 1, 7, 8, 9, 5, 6),
    (3, 4, 0, 1, 2, 8, 9, 5, 6, 7),
    (4, 0, 1, 2, 3, 9, 5, 6, 7, 8),
    (5, 9, 8, 7, 6, 0, 4, 3, 2, 1),
    (6, 5, 9, 8, 7, 1, 0, 4, 3, 2),
    (7, 6, 5, 9, 8, 2, 1, 0, 4, 3),
    (8, 7, 6, 5, 9, 3, 2, 1, 0, 4),
    (9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
)
_PERMUTED = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9),
    (1, 5, 7, 6, 2, 8, 3, 0, 9, 4),
    (5, 8, 0, 3, 7, 9, 6, 1, 4, 2),
    (8, 9, 1, 6, 0, 4, 3, 5, 2, 7),
    (9, 4, 5, 3, 1, 2, 6, 8, 7, 0),
    (4, 2, 8, 6, 5, 7, 3, 9, 0, 1),
    (2, 7, 9, 3, 8, 0, 6, 4, 1, 5),
    (7, 0, 4, 6, 9, 1, 3, 2, 5, 8),
)
_ITALIAN_ODD = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21, 2, 4, 18, 20, 11, 3, 6, 8, 12, 14, 16, 10, 22, 25, 24, 23)
#: Taiwan's letters stand for these numbers, from A
_TAIWAN = (
    10,
    11,
    12,
    13,
    14,
    15,
    16,
    17,
    34,
    18,
    19,
    20,
    21,
    22,
    35,
    23,
    24,
    25,
    26,
    27,
    28,
    29,
    32,
    30,
    31,
    33,
)


def luhn(digits: str) -> bool:
    """Cards, and numbers that copy them."""
    total = 0
    for place, digit in enumerate(map(int, reversed(digits))):
        total += digit if place % 2 == 0 else digit * 2 - 9 * (digit > 4)
    return total % 10 == 0


def is_card(digits: str) -> bool:
    """Whether a number begins as an issuer's do, is as long as theirs, and its check digit is right."""
    head2, head3, head4, length = int(digits[:2]), int(digits[:3]), int(digits[:4]), len(digits)
    known = (
        (digits[0] == "4" and length in (13, 16, 19))
        or (head2 in (34, 37) and length == 15)
        or (length == 14 and (head2 in (36, 38) or 300 <= head3 <= 305))
        or (length == 16 and (51 <= head2 <= 55 or 2200 <= head4 <= 2204 or 2221 <= head4 <= 2720))
        or (length == 16 and (3528 <= head4 <= 3589 or head2 in (81, 82) or head3 in (508, 353, 356)))
        or (16 <= length <= 19 and (digits[0] == "6" or head2 in (50, 56, 57, 58)))
    )
    return known and len(set(digits)) > 1 and luhn(digits)


def is_iban(text: str) -> bool:
    """`text`: upper case, without spaces. The country's length, and 1 modulo 97."""
    if IBAN_CHARS.get(text[:2]) != len(text):
        return False
    moved = text[4:] + text[:4]
    return int("".join(str(int(c, 36)) for c in moved)) % 97 == 1


def chinese_id(text: str) -> bool:
    """GB 11643: 17 digits and one of 0 to 9 or X."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(int(d) * w for d, w in zip(text[:17], weights, strict=True))
    return "10X98765432"[total % 11] == text[17].upper()


def social_security(digits: str) -> bool:
    """United States: ranges that are given out."""
    area = digits[:3]
    return (
        len(digits) == 9
        and area not in ("000", "666")
        and area < "900"
        and digits[3:5] != "00"
        and digits[5:] != "0000"
    )


def verhoeff(digits: str) -> bool:
    """Aadhaar."""
    check = 0
    for place, digit in enumerate(map(int, reversed(digits))):
        check = _D5[check][_PERMUTED[place % 8][digit]]
    return len(digits) == 12 and digits[0] >= "2" and check == 0


def cpf(digits: str) -> bool:
    """Brazil."""
    if len(digits) != 11 or len(set(digits)) == 1:
        return False
    for count in (9, 10):
        total = sum(int(d) * (count + 1 - i) for i, d in enumerate(digits[:count]))
        if total * 10 % 11 % 10 != int(digits[count]):
            return False
    return True


def spanish_id(text: str) -> bool:
    """DNI and NIE: seven or eight digits and a letter, perhaps after X, Y or Z."""
    number = {"X": "0", "Y": "1", "Z": "2"}.get(text[0], text[0]) + text[1:-1]
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23] == text[-1].upper()


def german_tax_id(digits: str) -> bool:
    """ISO 7064 (11, 10); one of the first ten digits comes twice or three times."""
    if len(digits) != 11 or digits[0] == "0" or not 8 <= len(set(digits[:10])) <= 9:
        return False
    product = 10
    for digit in map(int, digits[:10]):
        product = ((digit + product) % 10 or 10) * 2 % 11
    return (11 - product) % 10 == int(digits[10])


def french_nir(text: str) -> bool:
    """13 digits (2A and 2B in Corsica) and a key of two."""
    number = text[:13].replace("2A", "19").replace("2B", "18")
    return number.isdigit() and 97 - int(number) % 97 == int(text[13:])


def codice_fiscale(text: str) -> bool:
    """Italy: 16 letters and digits, the last a check letter."""
    values = [int(c) if c.isdigit() else ord(c) - ord("A") for c in text[:15]]
    total = sum(_ITALIAN_ODD[v] if i % 2 == 0 else v for i, v in enumerate(values))
    return chr(ord("A") + total % 26) == text[15]


def ean13(digits: str) -> bool:
    """Switzerland's AHV numbers."""
    return sum(int(d) * (3 if i % 2 else 1) for i, d in enumerate(digits)) % 10 == 0


def singapore_id(text: str) -> bool:
    """NRIC and FIN."""
    total = sum(int(d) * w for d, w in zip(text[1:8], (2, 7, 6, 5, 4, 3, 2), strict=True))
    total += 4 if text[0] in "TG" else 3 if text[0] == "M" else 0
    letters = {"S": "JZIHGFEDCBA", "T": "JZIHGFEDCBA", "M": "KLJNPQRTUWX"}.get(text[0], "XWUTRQPNMLK")
    place = total % 11 if text[0] != "M" else 10 - total % 11
    return letters[place] == text[8]


def taiwan_id(text: str) -> bool:
    """A letter and nine digits."""
    letter = _TAIWAN[ord(text[0]) - ord("A")]
    total = (
        letter // 10
        + letter % 10 * 9
        + sum(int(d) * w for d, w in zip(text[1:9], range(8, 0, -1), strict=True))
    )
    return (total + int(text[9])) % 10 == 0


def elfproef(digits: str) -> bool:
    """The Netherlands' BSN."""
    total = sum(int(d) * w for d, w in zip(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1), strict=False))
    return len(digits) == 9 and digits != "0" * 9 and total % 11 == 0


def pesel(digits: str) -> bool:
    """Poland."""
    weights = (1, 3, 7, 9, 1, 3, 7, 9, 1, 3, 1)
    return len(digits) == 11 and sum(int(d) * w for d, w in zip(digits, weights, strict=True)) % 10 == 0


def nhs_number(digits: str) -> bool:
    """England's health service."""
    if len(digits) != 10:
        return False
    return (11 - sum(int(d) * (10 - i) for i, d in enumerate(digits[:9])) % 11) % 11 == int(digits[9])
