"""Numbers in text: which one an answer ends in, whatever its commas, sign, unit, exponent or fraction."""

import math
import re
import unicodedata

RELATIVE_TOLERANCE = 1e-6
"""Two numbers are equal within this share of the larger one, so that 0.1 + 0.2 is 0.3."""

_MINUS_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-"})
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_THIN_SPACE = re.compile(r"(?<=\d)[\u2009\u202f\u00a0](?=\d{3})")
_NUMBER = re.compile(
    r"""
    (?<![A-Za-z_^.\d])(?<!\^\{)(?<!\^-)(?<!\^\{-)  # not the 2 of CO2, m^-2 or 1.2
    (?P<sign>(?<![\w)\]}])[-+])?                    # the minus of 10-4 is no sign
    (?<![A-Za-z_^])
    (?:[$€£¥]\s?)?
    (?P<digits>\d{1,3}(?:[,']\d{2,3})*[,']\d{3}(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)
    (?:(?P<exponent>[eE][-+]?\d+)
      |\s*(?:×|x|\*|\\times|\\cdot)\s*10\s*\^\s*\{?(?P<power>[-+]?\d+)\}?
      |/(?P<denominator>\d+)(?![\d/]))?             # 3/4, but not the date 3/4/2025
    """,
    re.VERBOSE,
)


def last_number(text: str) -> float | None:
    """The last finite number of a text, or None. `-1,234.5 km` is -1234.5, `3/4` is 0.75, `2 × 10³` is 2000."""
    found = None
    for match in _NUMBER.finditer(_plain(text)):
        value = _value(match)
        if value is not None:
            found = value
    return found


def equal_numbers(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-12)


def _plain(text: str) -> str:
    """Full-width digits as ASCII, superscripts as powers, one minus sign, no thin spaces inside numbers."""
    text = _RAISED.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    text = _THIN_SPACE.sub("", text)
    return unicodedata.normalize("NFKC", text.translate(_MINUS_SIGNS)).translate(_MINUS_SIGNS)


def _value(match: re.Match[str]) -> float | None:
    try:
        value = float(re.sub("[,']", "", match["digits"]) + (match["exponent"] or f"e{match['power'] or 0}"))
    except ValueError:  # digits of other scripts that are no decimal digits
        return None
    if match["denominator"]:
        denominator = float(match["denominator"])
        if not denominator:
            return None
        value /= denominator
    return (-value if match["sign"] == "-" else value) if math.isfinite(value) else None
