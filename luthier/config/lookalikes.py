"""Characters that look like the marks of YAML and JSON and are others: a full-width colon, a no-break space, ...

Input methods and web pages put them into run files, where they look the same to the eye. So messages name them.
"""

import re
import unicodedata
from collections.abc import Iterable

_SPACES = "\u00a0\u1680\u2000-\u200b\u202f\u205f\u2060\u3000\ufeff"
_COLONS, _QUOTES = "\uff1a\ufe55\ufe30\u2236\ua789", "\u201c\u201d\u2018\u2019\uff02\uff07"
_BRACKETS = "\uff0c\uff3b\uff3d\uff5b\uff5d"
_OTHERS = "\uff03\uff0d\u2010-\u2015\u2212"
_KEY = r"""^[ \t]*(?:-[ ]+)?["']?[A-Za-z_][\w.-]*["']?"""
_IN_PLACE_OF_A_MARK = tuple(
    map(re.compile, (rf"{_KEY}\s*([{_COLONS}])", rf"{_KEY}[ ]*:[ ]*([{_SPACES}])", rf"^[ \t]*([{_SPACES}])"))
)
"""After a key, after its colon, and in the indentation."""
_IN_A_LIST = re.compile(rf"[\[{{].*?([{_BRACKETS}])")
_ANY = re.compile(f"([{_SPACES}{_COLONS}{_QUOTES}{_BRACKETS}{_OTHERS}])")
_SPACE_AT_AN_END = re.compile(rf"^([{_SPACES}])|([{_SPACES}])$")


def named(character: str) -> str:
    """The name and code of a character, e.g. `a fullwidth colon '：' (U+FF1A)`."""
    name = unicodedata.name(character, "character").lower()
    shown = "" if character.isspace() or not character.isprintable() else f" '{character}'"
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}{shown} (U+{ord(character):04X})"


def in_line(line: str, *, is_list: bool = False) -> str | None:
    """The character that stands where YAML needs a mark or a common space. `is_list`: also inside [] and {}."""
    patterns = (*_IN_PLACE_OF_A_MARK, _IN_A_LIST) if is_list else _IN_PLACE_OF_A_MARK
    return _first(pattern.search(line) for pattern in patterns)


def in_key(key: str) -> str | None:
    """The first such character in a key, none of which has any."""
    return _first([_ANY.search(key)])


def without_spaces(key: str) -> str:
    """The key without such spaces, as it was meant."""
    return re.sub(f"[{_SPACES}]", "", key)


def around(value: str) -> str | None:
    """Such a space at the beginning or end of a value, where YAML strips common ones."""
    return _first([_SPACE_AT_AN_END.search(value)])


def _first(matches: Iterable[re.Match[str] | None]) -> str | None:
    return next((found for match in matches if match for found in match.groups() if found), None)
