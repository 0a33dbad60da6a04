"""Numbers in text: which one an answer ends in, whatever its commas, sign, unit, exponent or fraction."""

import math
import re
import unicodedata

RELATIVE_TOLERANCE = 1e-6
"""Two numbers are equal within this share of the larger one, so that 0.1 + 0.2 is 0.3; whole numbers are exact."""

_MINUS_SIGNS = str.maketrans({"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\uff0d": "-"})
_SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻"
_RAISED = re.compile(f"[{_SUPERSCRIPTS}]+")
_FRACTION = re.compile(
    r"(?<![\d.,'])(?P<whole>\d*)(?:(?P<sign>[\u00bc-\u00be\u2150-\u215e\u2189])"
    r"|\\[dt]?frac\s*\{\s*(?P<above>\d+)\s*\}\s*\{\s*(?P<below>0*[1-9]\d*)\s*\})"
)
"""`½`, `2½`, and `\\frac{1}{2}` as LaTeX has it."""
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
    found, plain = None, _plain(text)
    for match in _NUMBER.finditer(plain):
        value = _value(match, is_date=plain[match.start() - 1 : match.start()] == "/")
        if value is not None:
            found = value
    return found


def equal_numbers(one: float, other: float) -> bool:
    if float(one).is_integer() and float(other).is_integer():
        return one == other
    return math.isclose(one, other, rel_tol=RELATIVE_TOLERANCE, abs_tol=1e-12)


def _plain(text: str) -> str:
    """Full-width digits as ASCII, superscripts as powers, `½` as 0.5, one minus sign, no thin spaces in numbers."""
    text = _RAISED.sub(lambda match: "^" + unicodedata.normalize("NFKC", match[0]), text)
    text = _THIN_SPACE.sub("", text)
    text = _FRACTION.sub(_decimal, text)
    return unicodedata.normalize("NFKC", text.translate(_MINUS_SIGNS)).translate(_MINUS_SIGNS)


def _decimal(match: re.Match[str]) -> str:
    share = unicodedata.numeric(match["sign"]) if match["sign"] else float(match["above"]) / float(match["below"])
    return str(float(match["whole"] or 0) + share)


def _value(match: re.Match[str], *, is_date: bool) -> float | None:
    """`is_date`: a slash stands before it, so that 4/2025 in 3/4/2025 is no fraction and ends in 2025."""
    if is_date and match["denominator"]:
        return _finite(float(match["denominator"]))
    try:
        value = float(re.sub("[,']", "", match["digits"]) + (match["exponent"] or f"e{match['power'] or 0}"))
    except ValueError:  # digits of other scripts that are no decimal digits
        return None
    if match["denominator"]:
        denominator = float(match["denominator"])
        if not denominator:
            return None
        value /= denominator
    return _finite(-value if match["sign"] == "-" else value)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
