"""From what a user wrote to a value of the declared type, or a phrase that says why not.

YAML, JSON and Python values keep their type: only a number is a number, only true and false are booleans. A `Text` (a
word of the command line, or the result of an interpolation) has no type yet and is parsed as the type of the key.
"""

import math
import os
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import yaml

BOOL_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NULL_WORDS = ("null", "Null", "NULL", "~")
"""The words of YAML for nothing."""
WORDS_LIKE_NULL = frozenset({"none", "null", "~", "nil", "nan", ".nan"})
"""Words, in small letters, that mean nothing in other languages, or would without quotes. They are texts in YAML."""
_REAL_WORDS = {("device", "none")}
"""(name, text) inside mappings that means what it says: DeepSpeed calls it so to offload nothing."""
PARSED_KINDS = (bool, int, float, dict, tuple, str)
"""The order in which the members of a union are tried, so that text is the last resort."""


BaseLoader: Any = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader


class Loader(BaseLoader):
    """Safe YAML in which 1e-4 is a number, as in YAML 1.2 and JSON."""


FLOAT_TAG, SIGN_OR_DIGIT = "tag:yaml.org,2002:float", list("-+0123456789")
FLOAT_WITHOUT_DOT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$")
Loader.add_implicit_resolver(FLOAT_TAG, FLOAT_WITHOUT_DOT, SIGN_OR_DIGIT)


class Text(str):
    """Untyped text; see the docstring of the module."""

    __slots__ = ()


class Misfit(ValueError):
    """The value does not have the type; `reason` and `remedy` are phrases for the user."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


class MisfitWithin(Misfit):
    """The value has the type, and something in it is wrong."""


def describe_type(expected: Any, choices: tuple[str, ...] = ()) -> str:
    """The type in words, e.g. `whole number or null`."""
    origin, args = get_origin(expected), get_args(expected)
    if origin in (Union, types.UnionType):
        members = [describe_type(a, choices) for a in args if a is not type(None)]
        return " or ".join(members + ["null"] * (type(None) in args))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if origin is tuple:
        if get_origin(args[0]) is Literal:
            return f"list of texts out of {', '.join(get_args(args[0]))}"
        items = {str: "texts", float: "numbers"}[args[0]]
        return f"list of {items}" + (f" out of {', '.join(choices)}" if choices else "")
    if choices and expected is str:
        return f"one of {', '.join(choices)}"
    return {bool: "true or false", int: "whole number", float: "number", str: "text"}.get(expected, "mapping")


def is_null(value: Any) -> bool:
    return value is None or (isinstance(value, Text) and value in NULL_WORDS)


def decode(value: Any, expected: Any, choices: tuple[str, ...] = ()) -> Any:
    """`value` as the annotation `expected`, text being one of `choices` if there are any. Raises `Misfit`."""
    members = get_args(expected) if get_origin(expected) in (Union, types.UnionType) else (expected,)
    if type(None) in members and is_null(value):
        return None
    _refuse_word_like_null(value, expected, members, choices)
    members = tuple(m for m in members if m is not type(None))
    if len(members) == 1:
        return _decode_one(value, members[0], choices)
    for kind in PARSED_KINDS:
        for member in members:
            if member is kind or get_origin(member) is kind:
                try:
                    decoded = _decode_one(value, member, choices)
                except MisfitWithin:
                    raise
                except Misfit as misfit:
                    if kind is str and choices and isinstance(value, str):
                        raise misfit from None
                    continue
                # A single text for `list | str` stays a text: a pattern or a path is not a list.
                if not (kind is tuple and str in members and isinstance(value, str) and "," not in value):
                    return decoded
    raise Misfit(f"must be {describe_type(expected, choices)}")


def _refuse_word_like_null(value: Any, expected: Any, members: tuple[Any, ...], choices: tuple[str, ...]) -> None:
    """Refuse `None`, `nan` and the like, of which no text, list or path is meant to consist."""
    if not isinstance(value, str) or value.strip().lower() not in WORDS_LIKE_NULL or choices:
        return
    if any(value in get_args(member) for member in members if get_origin(member) is Literal):
        return
    may_be_null = type(None) in members or any(get_origin(member) is tuple for member in members)
    if may_be_null or str in members:
        remedy = "write null without quotes, or leave the key out" if may_be_null else "write the text that is meant"
        raise Misfit(f"must be {describe_type(expected)}, not the word {value.strip()}", remedy)


def _decode_one(value: Any, expected: Any, choices: tuple[str, ...]) -> Any:
    origin = get_origin(expected)
    if origin is Literal:
        return _choice(value, get_args(expected))
    if origin is tuple:
        return _items(value, get_args(expected)[0], choices)
    if expected is dict or origin is dict:
        return _mapping(value)
    if expected is str and choices:
        return _choice(value, choices)
    return {bool: _bool, int: _int, float: _float, str: _str}[expected](value)


def _bool(value: Any) -> bool:
    if isinstance(value, Text) and value.lower() in BOOL_WORDS:
        return BOOL_WORDS[value.lower()]
    if isinstance(value, bool):
        return value
    raise Misfit("must be true or false", _unquote(value, BOOL_WORDS))


def _int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, Text):
        try:
            return int(value)
        except ValueError:
            pass
    raise Misfit("must be a whole number", _unquote(value, ()))


def _float(value: Any) -> float:
    # YAML 1.1 reads 5e-6 as text, so text that spells a number is one.
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):  # the latter of a whole number beyond all floats
            number = math.nan
        if not math.isnan(number):
            return number
    raise Misfit("must be a number")


def _str(value: Any) -> str:
    if isinstance(value, str | os.PathLike):
        text = str(os.fspath(value))
        if "\0" in text:
            raise Misfit("holds a NUL character, which no name or path has", "remove it")
        try:
            os.fsencode(text)
        except UnicodeEncodeError:
            raise Misfit("holds half a character (a lone surrogate), which no name or path has", "remove it") from None
        return text
    remedy = (
        "" if isinstance(value, list | tuple | Mapping) or value is None else f'write it in quotes: "{_plain(value)}"'
    )
    raise Misfit("must be text", remedy)


def _choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if value is False and "no" in choices:  # YAML 1.1 reads the word no as false
        return "no"
    if isinstance(value, str) and str(value) in choices:
        return str(value)
    from luthier.core.registry import did_you_mean

    raise Misfit(f"must be one of {', '.join(map(str, choices))}", did_you_mean(str(value), map(str, choices)))


def _items(value: Any, item_type: Any, choices: tuple[str, ...]) -> tuple[Any, ...]:
    if isinstance(value, str):
        if isinstance(value, Text) and value.startswith("["):
            value = parse_value(value)
        else:
            value = [Text(item.strip()) for item in value.split(",") if item.strip()]
    elif isinstance(value, int | float) and not isinstance(value, bool) and item_type is float:
        value = [value]
    elif value is False and "no" in choices:
        value = ["no"]
    if not isinstance(value, list | tuple):
        raise Misfit(f"must be a {describe_type(tuple[item_type, ...])}, written with commas or as a list")
    return tuple(decode(item, item_type, choices) for item in value)


def _mapping(value: Any) -> dict[str, Any]:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        value = parse_value(value)
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        _refuse_words_within(value, ())
        return dict(value)
    raise Misfit("must be a mapping, or JSON text of one")


def _refuse_words_within(value: Any, path: tuple[str, ...]) -> None:
    """Refuse words like `None` and numbers like `.nan` inside a mapping, which YAML and JSON do not read as nothing."""
    if isinstance(value, Mapping):
        for name, member in value.items():
            _refuse_words_within(member, (*path, str(name)))
    elif isinstance(value, list | tuple):
        for index, member in enumerate(value):
            _refuse_words_within(member, (*path, str(index)))
    elif isinstance(value, float) and math.isnan(value):
        raise MisfitWithin(
            f"holds nan at {'.'.join(path)}, which is not a number", "write a number, or null without quotes"
        )
    elif isinstance(value, str) and value.strip().lower() in WORDS_LIKE_NULL and (path[-1], value) not in _REAL_WORDS:
        reason = f"holds the word {value.strip()} at {'.'.join(path)}"
        raise MisfitWithin(reason, "write null without quotes, or leave it out")


def parse_value(text: str) -> Any:
    """The value that `text` spells in YAML, of which JSON is a part. Raises `Misfit`."""
    try:
        return yaml.load(str(text), Loader)  # libyaml takes no subclass of str
    except (yaml.YAMLError, ValueError):
        raise Misfit("is neither YAML nor JSON") from None


def _unquote(value: Any, words: Any) -> str:
    if isinstance(value, str) and not isinstance(value, Text) and (value.lower() in words or value.isdigit()):
        return "remove the quotes"
    return ""


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
