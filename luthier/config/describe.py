"""Keys in words and as JSON Schema, for `explain`, `schema` and the key reference."""

import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from luthier.config.decode import describe_type
from luthier.config.key_table import TRAINING, Key, catalog
from luthier.config.masking import masked
from luthier.config.other_versions import other_key
from luthier.config.rules.engine import Rule
from luthier.config.rules.table import all_rules
from luthier.config.sections import COMMAND_WORDS, RUN_COMMANDS
from luthier.core.errors import UnknownVariant
from luthier.core.registry import did_you_mean

__all__ = ["explain", "help_of", "masked", "rules_about", "schema", "shown", "status_of"]

TRAINING_HELP = Path(__file__).with_name("training_help.toml")
SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"


@cache
def _training_help() -> Mapping[str, str]:
    return tomllib.loads(TRAINING_HELP.read_text(encoding="utf-8"))


@cache
def _help_strings(config: type) -> Mapping[str, str]:
    """Field -> the string under it, those of inherited fields included."""
    found: dict[str, str] = {}
    for owner in reversed(config.__mro__[:-1]):
        found |= _own_help_strings(owner)
    return found


@cache
def _own_help_strings(config: type) -> Mapping[str, str]:
    """Field -> the string under it in the source of the class."""
    path = sys.modules[config.__module__].__file__
    assert path is not None
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == config.__name__).body
    found = {}
    for field, below in pairwise(body):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(below, ast.Expr)
            and isinstance(below.value, ast.Constant)
        ):
            found[field.target.id] = " ".join(str(below.value.value).split())
    return found


def help_of(key: Key) -> str:
    """One line: what the key does."""
    return _training_help()[key.name] if key.section is TRAINING else _help_strings(key.section.config)[key.name]


def shown(value: Any) -> str:
    """A default as one would write it in YAML."""
    if value is None or value == ():
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def status_of(key: Key) -> str:
    """What this version does with the key, with the reason."""
    if key.status == "refused":
        return f"refused unless {' or '.join(dict.fromkeys(map(shown, key.allowed)))}: {key.reason} -> {key.remedy}"
    if key.status == "no_effect":
        return f"accepted without effect: {key.reason}"
    if key.status == "later":
        return "known, but not read by this version"
    return f"accepted: {key.reason}" if key.status == "renamed" else "supported"


def rules_about(name: str) -> Iterator[str]:
    """Each rule that the key takes part in, in words, with the variants and commands that it is for.

    e.g. `error for stage: dpo or stage: rm: on_overlong (together with stage): cuts a row into several, ... -> ...`
    """
    owners: dict[str, set[str]] = {}
    commands: dict[str, set[str]] = {}
    for rule, command, owner in all_rules():
        if name in rule.keys:
            text = _in_words(rule)
            owners.setdefault(text, set()).add(owner)
            commands.setdefault(text, set()).add(command)
    readers = {command for key in catalog()[name] for command in key.section.commands}
    for text, variants in owners.items():
        weight, text_of_rule = text.split(": ", 1)
        where = "" if "" in variants else f" for {' or '.join(sorted(variants))}"
        if not where and readers - commands[text]:
            where = f" in {' and '.join(f'`{COMMAND_WORDS[c]}`' for c in RUN_COMMANDS if c in commands[text])}"
        yield f"{weight}{where}: {text_of_rule}"


def _in_words(rule: Rule) -> str:
    others = f" (together with {', '.join(rule.keys[1:])})" if rule.keys[1:] else ""
    weight = "warning" if rule.only_warns else "error"
    return f"{weight}: {rule.keys[0]}{others}: {rule.reason}" + (f" -> {rule.remedy}" if rule.remedy else "")


def explain(name: str) -> str:
    """All about one key. Raises `UnknownVariant` with what to write instead, or with the nearest name."""
    if name not in catalog():
        if other := other_key(name):
            raise UnknownVariant(f"{name}: {other.reason} -> {other.remedy}")
        hint = did_you_mean(name, catalog())
        raise UnknownVariant(f"{name}: unknown key" + (f"; {hint}" if hint else ""))
    keys = catalog()[name]
    lines = [name, *(f"  {text}" for text in dict.fromkeys(help_of(key) for key in keys))]
    first = keys[0]
    lines.append(f"  type      {describe_type(first.type, first.choices)}")
    lines.append(f"  default   {'none, it must be given' if first.is_required else shown(first.default)}")
    lines.append(f"  read by   {', '.join(dict.fromkeys(key.section.reader() for key in keys))}")
    lines.append(f"  status    {status_of(first)}")
    lines += [f"  {'rules' if number == 0 else '':<10}{text}" for number, text in enumerate(rules_about(name))]
    return "\n".join(lines)


def schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a run file. A value may always be text with an interpolation in it."""
    properties: dict[str, Any] = {}
    for name, keys in catalog().items():
        key = keys[0]
        entry: dict[str, Any] = {"description": help_of(key)}
        if key.status not in ("supported", "renamed"):
            entry["description"] += f" ({status_of(key)})"
        alternatives = list(_schemas(key.type, key.choices))
        if not any(part == {"type": "string"} for part in alternatives):
            alternatives.append({"$ref": "#/$defs/interpolation"})
        entry |= alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}
        if not key.is_required:
            entry["default"] = list(key.default) if isinstance(key.default, tuple) else key.default
        if key.status in ("renamed", "refused", "no_effect"):
            entry["deprecated"] = True
        properties[name] = entry
    return {
        "$schema": SCHEMA_DIALECT,
        "title": "Run file of luthier",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": {"interpolation": {"type": "string", "pattern": r"\$\{"}},
    }


def _schemas(expected: Any, choices: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """One schema for each kind of value that the type takes."""
    origin, args = get_origin(expected), get_args(expected)
    if origin is Literal:
        yield {"enum": list(args)}
    elif origin is tuple:
        (item,) = _schemas(args[0], choices)
        yield {"type": "string"}
        yield {"type": "array", "items": item}
        yield {"type": "null"}
        if args[0] is float:
            yield item
    elif origin is not None and origin is not dict:
        yield from (part for member in args for part in _schemas(member, choices))
    elif expected is str and choices:
        yield {"enum": list(choices)}
        if "no" in choices:  # which YAML 1.1 reads as false
            yield {"const": False}
    else:
        names = {bool: "boolean", int: "integer", float: "number", str: "string", NoneType: "null"}
        yield {"type": names.get(expected, "object")}
        if expected not in names:
            yield {"type": "string", "pattern": r"^\s*\{"}
