"""The text of a run file and the values of its keys: two views of one thing, and a change of one shows in the other.

Comments, order and spelling of everything that is not changed stay as the user wrote them.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from luthier.config.decode import Loader

YAML_BREAKS = "\n\r\x85\u2028\u2029"
"""What YAML folds to a space unless it is escaped."""


def values_of(text: str) -> dict[str, str]:
    """Key -> its value as text for a field, e.g. `1e-4`, `a, b` or `{"num_cycles": 2}`. Empty if it is no mapping."""
    try:
        return {key: _shown(value) for key, value in _members(text)}
    except RecursionError:  # an alias inside the value that it names; `luthier check` says so
        return {}


def with_value(text: str, key: str, written: str | None) -> str:
    """The text in which `key` has the value that `written` is in YAML; None removes the key.

    A text that is no mapping stays as it is.
    """
    lines = text.splitlines(keepends=True)
    try:
        span = _spans(text).get(key)
    except yaml.YAMLError:
        return text
    if span is None:
        if written is None:
            return text
        end = "" if not text or text.endswith("\n") else "\n"
        return f"{text}{end}{key}: {written}\n"
    first, last, comment = span
    new = [] if written is None else [f"{key}: {written}{comment}\n"]
    return "".join([*lines[:first], *new, *lines[last + 1 :]])


def as_yaml(value: str, *, is_text: bool) -> str:
    """What a user typed into a field, as a value of YAML. `is_text`: its key takes a text, so `12` gets quotes."""
    value = value.strip()
    has_breaks = any(mark in value for mark in YAML_BREAKS)
    try:
        read = None if has_breaks else Loader(value).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: 2024-02-30, which is no date
        read = None
    if (read == value and isinstance(read, str)) or (isinstance(read, list | dict) and value[:1] in "[{"):
        return value
    if not is_text and isinstance(read, bool | int | float) and len(value.split()) == 1:  # one word: no comment
        return value
    # PyYAML writes 1E5 without quotes, which is a number to the loader of run files.
    style = None if isinstance(read, str) or has_breaks else "'"
    written = str(yaml.safe_dump(value, width=10_000, allow_unicode=not has_breaks, default_style=style))
    return written.removesuffix("\n").removesuffix("\n...")


def _members(text: str) -> Iterator[tuple[str, yaml.Node]]:
    try:
        node = Loader(text).get_single_node()
    except yaml.YAMLError:
        return
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        if isinstance(key, yaml.ScalarNode):
            yield str(key.value), value


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return str(node.value)
    if isinstance(node, yaml.SequenceNode) and all(isinstance(item, yaml.ScalarNode) for item in node.value):
        return ", ".join(str(item.value) for item in node.value)
    return str(yaml.serialize(_flow(node), width=10_000)).strip()


def _flow(node: yaml.Node) -> yaml.Node:
    """The same on one line, with brackets."""
    if isinstance(node, yaml.MappingNode):
        pairs = [(_flow(key), _flow(value)) for key, value in node.value]
        return yaml.MappingNode(node.tag, pairs, flow_style=True)
    if isinstance(node, yaml.SequenceNode):
        return yaml.SequenceNode(node.tag, [_flow(item) for item in node.value], flow_style=True)
    return node


def _spans(text: str) -> Mapping[str, tuple[int, int, str]]:
    """Key -> (its first line, its last line, the comment behind its value). Raises `YAMLError`."""
    node = Loader(text).get_single_node()
    if node is not None and not (isinstance(node, yaml.MappingNode) and not node.flow_style):
        raise yaml.YAMLError("the text is not a mapping with a key on each line")
    lines = text.splitlines()
    found = {}
    for key, value in node.value if node is not None else ():
        first, last = key.start_mark.line, value.end_mark.line
        if value.end_mark.column == 0:  # of a block, which ends where the next key begins
            last -= 1
            while last > first and (not lines[last].strip() or lines[last].lstrip().startswith("#")):
                last -= 1
            found[str(key.value)] = (first, last, "")
        else:
            found[str(key.value)] = (first, last, lines[last][value.end_mark.column :].rstrip())
    return found


def differing(texts: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Key -> name of the run file -> value, for the keys that are not the same in all run files."""
    values = {name: values_of(text) for name, text in texts.items()}
    keys = dict.fromkeys(key for found in values.values() for key in found)
    rows = {key: {name: found.get(key) for name, found in values.items()} for key in keys}
    return {key: row for key, row in rows.items() if len(set(row.values())) > 1}
