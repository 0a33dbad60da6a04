"""The last number of a text."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.evals.numbers import equal_numbers, last_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 42.", 42),
        ("3 + 4 = 7", 7),
        ("#### 1,234", 1234),
        ("1,234,567.5 km", 1234567.5),
        ("Rs 1,00,000", 100000),
        ("1'000 Franken", 1000),
        ("12\u202f000 pages", 12000),
        ("x = -5", -5),
        ("x = \u22125", -5),
        ("-$3.50", -3.5),
        ("$ 18", 18),
        ("10-4", 4),
        ("pages 3\u20135", 5),
        ("(2)-(1)", 1),
        ("6.02e23", 6.02e23),
        ("1.5E-3 s", 0.0015),
        ("2 × 10³ m", 2000),
        (r"\boxed{1.2 \times 10^{-4}}", 1.2e-4),
        (r"$\boxed{42}$", 42),
        ("**17**", 17),
        ("about 50%", 50),
        ("3/4", 0.75),
        ("5 m²", 5),
        ("5 m^2", 5),
        ("9.8 m s^-2", 9.8),
        (r"9.8 \\text{ms}^{-2}", 9.8),
        ("7 g of CO2", 7),
        ("5kg", 5),
        (".5", 0.5),
        ("答案是12个", 12),
        ("１２３", 123),
        ("1,2,3", 3),
        ("1/0 is not 7", 7),
        ("on 3/4/2025", 2025),
        ("½ cup", 0.5),
        ("-2½", -2.5),
        (r"$\boxed{-\frac{3}{4}}$", -0.75),
        (r"1 \dfrac{1}{ 8 }", 0.125),
        (r"2\frac{1}{4}", 2.25),
        (r"\frac{6}{0}", 0),
    ],
)
def test_it_is_found(text, number):
    assert last_number(text) == pytest.approx(number, rel=1e-12)


@pytest.mark.parametrize("text", ["", "no number", "CO2", "1/0", "1e999", "--"])
def test_a_text_without_one(text):
    assert last_number(text) is None


@given(st.floats(allow_nan=False, allow_infinity=False), st.text(alphabet="abc xyz\n", max_size=9))
def test_every_way_to_write_a_number_is_read(number, words):
    """Python's own shortest form, fixed with separators, and with an exponent, between words."""
    forms = [repr(number), f"{number:.17e}"] + ([f"{number:,.6f}"] if 1 < abs(number) < 1e12 else [])
    for form in forms:
        found = last_number(f"{words} {form} {words}")
        assert found is not None
        assert math.isclose(found, number, rel_tol=1e-6)


@given(st.text())
def test_any_text_may_come(text):
    found = last_number(text)
    assert found is None or math.isfinite(found)


def test_equality_allows_rounding_errors_alone():
    assert equal_numbers(0.1 + 0.2, 0.3)
    assert not equal_numbers(100, 100.01)
    assert not equal_numbers(0, 1e-6)
    assert not equal_numbers(12_345_678, 12_345_679)
    assert equal_numbers(1 / 3, 0.3333333)
