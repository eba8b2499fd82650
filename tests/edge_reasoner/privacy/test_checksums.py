"""Check digits, against the issuers' own examples and against every single wrong digit."""

from __future__ import annotations

import pytest

from edge_reasoner.privacy import checksums

#: (rule, examples from the issuers' documents)
EXAMPLES = [
    (checksums.luhn, ["4111111111111111", "79927398713"]),
    (checksums.is_card, ["378282246310005", "6011000990139424", "3566002020360505", "5105105105105100"]),
    (
        checksums.is_iban,
        ["GB29NWBK60161331926819", "FR1420041010050500013M02606", "MT84MALT011000012345MTLCAST001S"],
    ),
    (checksums.chinese_id, ["11010519491231002X", "440524188001010014"]),
    (checksums.verhoeff, ["234123412346"]),
    (checksums.cpf, ["52998224725", "11144477735"]),
    (checksums.spanish_id, ["12345678Z", "X1234567L", "Y1234567X"]),
    (checksums.german_tax_id, ["86095742719", "47036892816"]),
    (checksums.french_nir, ["255081416802538"]),
    (checksums.codice_fiscale, ["RSSMRA85T10A562S"]),
    (checksums.ean13, ["7569217076985"]),
    (checksums.singapore_id, ["S1234567D", "T1234567J", "G1234567X"]),
    (checksums.taiwan_id, ["A123456789"]),
    (checksums.elfproef, ["111222333"]),
    (checksums.pesel, ["44051401359"]),
    (checksums.nhs_number, ["9434765919"]),
]


@pytest.mark.parametrize(("rule", "number"), [(rule, number) for rule, all_ in EXAMPLES for number in all_])
def test_rules(rule, number: str) -> None:
    """The example passes; with its last sign changed it does not."""
    assert rule(number)
    last = "1" if number[-1] == "0" else "0" if number[-1].isdigit() else "A" if number[-1] != "A" else "B"
    assert not rule(number[:-1] + last)


def test_ranges() -> None:
    """Numbers that were never given out, or are of another length, are none."""
    assert checksums.social_security("078051120")
    for digits in ("000051120", "666051120", "900051120", "078001120", "078050000", "07805112"):
        assert not checksums.social_security(digits)
    assert not checksums.is_card("0" * 16) and not checksums.is_card("1234567812345670")
    assert not checksums.is_iban("DE8937040044053201300") and not checksums.is_iban("ZZ89370400440532013000")
