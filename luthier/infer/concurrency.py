"""How many answers a model generates at the same time."""

from collections.abc import Mapping

from luthier.core.errors import InvalidInput

MAX_CONCURRENT = 8
"""How many answers are generated together, unless the environment variable of this name says otherwise."""
_MOST_CONCURRENT = 4096


def max_concurrent(environ: Mapping[str, str]) -> int:
    """The value of MAX_CONCURRENT. Raises `InvalidInput` unless it is a whole number above 0."""
    text = environ.get("MAX_CONCURRENT", "").strip() or str(MAX_CONCURRENT)
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= _MOST_CONCURRENT:
        raise InvalidInput(f"MAX_CONCURRENT: {text!r}: should be a whole number from 1 to {_MOST_CONCURRENT}")
    return int(text)
