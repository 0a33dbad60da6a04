"""Reading what a user wrote: a YAML or JSON file with overrides, flags, or a mapping. Values keep file and line.

luthier train run.yaml learning_rate=1e-4 lr_scheduler_kwargs.num_cycles=2
luthier train --stage sft --do_train --learning_rate 1e-4
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from luthier.config import lookalikes
from luthier.config.decode import Loader, Misfit, Text, parse_value
from luthier.core.errors import ConfigError, Problem

if TYPE_CHECKING:
    from _typeshed import StrPath

COMMAND_LINE = "command line"
MAPPING = "the given mapping"
SUFFIXES = (".yaml", ".yml", ".json")
_OTHER_FILES = {
    "distributed_type": (
        "is a configuration of accelerate, not a run file",
        "accelerate launch --config_file {} -m luthier train RUN, where RUN is the run file",
    ),
    "zero_optimization": ("is a configuration of DeepSpeed, not a run file", "name it in the run file: deepspeed: {}"),
}
"""Key that no run file has -> what a file with it is, and where to give it."""
_PLAIN = "write the common character of the keyboard"
_QUOTED = "remove it, or write the value in quotes"


@dataclass(frozen=True, slots=True)
class Entry:
    """One value as it was written, and where."""

    value: Any
    file: str
    line: int | None = None


@dataclass(slots=True)
class Written:
    """All that the user wrote; later words replace earlier ones. `problems` are faults that leave the rest readable."""

    source: str
    entries: dict[str, Entry] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def read(
    source: "StrPath | Mapping[str, Any] | Sequence[str]", overrides: Sequence[str], knows: Callable[[str], bool]
) -> Written:
    """Read a run file, a mapping, or the words of a command line (which may start with a run file).

    `knows` says whether a name is a key. Raises `ConfigError` if there is nothing that could be read.
    """
    if isinstance(source, Mapping):
        written = Written(MAPPING, {str(name): Entry(value, MAPPING) for name, value in source.items()})
        words = list(overrides)
    elif isinstance(source, list | tuple):
        words = [*source, *overrides]
        if not words:
            raise unreadable(COMMAND_LINE, "is missing", "name one, e.g. run.yaml")
        written = _read_file(Path(words.pop(0))) if words and is_file_name(words[0]) else Written(COMMAND_LINE)
    else:
        written = _read_file(Path(str(source)))
        words = list(overrides)
    _add_words(written, words, knows)
    return written


def is_file_name(word: str) -> bool:
    """Whether the first word of a command line names the run file."""
    return not word.startswith("-") and (word.endswith(SUFFIXES) or "=" not in word)


def unreadable(path: Path | str, reason: str, remedy: str = "", line: int | None = None) -> ConfigError:
    return ConfigError(str(path), [Problem("run file", reason, remedy, file=str(path), line=line)])


def _read_file(path: Path) -> Written:
    if path.is_dir():
        raise unreadable(path, "is a folder", "name the run file in it")
    if path.suffix not in SUFFIXES:
        raise unreadable(path, "is not a run file", "give it a name that ends in .yaml, .yml or .json")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise unreadable(path, "does not exist", f"the current folder is {Path.cwd()}") from None
    except UnicodeDecodeError as error:
        raise unreadable(path, f"is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    except OSError as error:
        raise unreadable(path, f"cannot be read: {error.strerror}") from None
    return parse(path, text)


def parse(path: Path, text: str) -> Written:
    """The keys in the text of a run file; `path` names it in messages. Raises `ConfigError` if it cannot be read."""
    if not text.strip():
        raise unreadable(path, "is empty")
    try:
        written = _read_json(path, text) if path.suffix == ".json" else _read_yaml(path, text)
    except RecursionError:
        reason = "is nested too deeply, or an alias (*name) stands inside the value that it names"
        raise unreadable(path, reason) from None
    for key, (reason, remedy) in _OTHER_FILES.items():
        if key in written.entries:
            raise unreadable(path, reason, remedy.format(path), written.entries[key].line)
    return written


def _read_yaml(path: Path, text: str) -> Written:
    try:
        loader = Loader(text)
        node = loader.get_single_node()
        if node is None:
            raise unreadable(path, "holds no keys")
        if not isinstance(node, yaml.MappingNode):
            lines, remedy = text.splitlines(), "write lines of the form `key: value`"
            fault = _lookalike(path, lines, 0, len(lines))
            raise fault or unreadable(path, "must be a mapping of keys to values", remedy)
        odd = list(_odd_characters(node, str(path)))
        written = Written(str(path), problems=[*_repeated_keys(node, str(path)), *odd])
        unclear = {problem.key for problem in odd}
        loader.flatten_mapping(node)
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and lookalikes.without_spaces(key.value) in unclear:
                continue
            if isinstance(key, yaml.ScalarNode):
                entry = Entry(loader.construct_object(value, deep=True), str(path), key.start_mark.line + 1)
                written.entries[key.value] = entry
            else:
                written.problems.append(
                    Problem("run file", "a key must be text", file=str(path), line=key.start_mark.line + 1)
                )
    except yaml.MarkedYAMLError as error:
        raise _invalid_yaml(path, text, error) from None
    except ConfigError:  # ours, and a ValueError too
        raise
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise unreadable(path, f"is not valid YAML: {error}") from None
    return written


def _invalid_yaml(path: Path, text: str, error: yaml.MarkedYAMLError) -> ConfigError:
    """The error with the line where the fault is, which may be above the line where the parser noticed it."""
    if error.problem_mark is None:
        return unreadable(path, f"is not valid YAML: {error.problem}")
    lines, last = text.splitlines(), error.problem_mark.line
    is_list = "flow" in (error.context or "")
    is_above = error.context == "while scanning a simple key" or error.problem == "found unexpected end of stream"
    first = error.context_mark.line if error.context_mark and (is_list or is_above) else last
    before = (number for number in range(first - 1, -1, -1) if lines[number].strip())
    if fault := _lookalike(path, lines, next(before, first), last, is_list=is_list):
        return fault
    return unreadable(path, f"is not valid YAML: {error.problem}", line=(first if is_above else last) + 1)


def _lookalike(path: Path, lines: Sequence[str], first: int, last: int, *, is_list: bool = False) -> ConfigError | None:
    """An error that names a character which only looks like a mark of YAML, in one of the lines, counted from 0."""
    for number, line in enumerate(lines[first : last + 1], start=first + 1):
        if character := lookalikes.in_line(line, is_list=is_list):
            reason = f"is not valid YAML: this line has {lookalikes.named(character)}"
            return unreadable(path, reason, _PLAIN, line=number)
    return None


def _odd_characters(node: yaml.Node, file: str, prefix: str = "") -> Iterator[Problem]:
    """Keys and values without quotes that hold characters which only look like common ones, at any depth."""
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name, line = prefix + lookalikes.without_spaces(key.value), key.start_mark.line + 1
        if not key.style and (character := lookalikes.in_key(key.value)):
            reason = f"the key holds {lookalikes.named(character)}"
            yield Problem(name, reason, _PLAIN, file=file, line=line)
        for item in value.value if isinstance(value, yaml.SequenceNode) else (value,):
            if isinstance(item, yaml.ScalarNode) and not item.style and (found := lookalikes.around(item.value)):
                reason = f"the value begins or ends with {lookalikes.named(found)}"
                yield Problem(name, reason, _QUOTED, file=file, line=item.start_mark.line + 1)
        yield from _odd_characters(value, file, f"{name}.")


def _repeated_keys(node: yaml.Node, file: str, prefix: str = "") -> list[Problem]:
    """A key written twice in one mapping, at any depth: YAML would silently take the last."""
    problems: list[Problem] = []
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in lines:
                    problems.append(_repeated(prefix + key.value, file, lines[key.value], line))
                lines.setdefault(key.value, line)
                problems += _repeated_keys(value, file, f"{prefix}{key.value}.")
    return problems


def _repeated(key: str, file: str, first: int, second: int) -> Problem:
    return Problem(key, f"written twice, on lines {first} and {second}", "keep one of them", file=file, line=second)


def _read_json(path: Path, text: str) -> Written:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if character := lookalikes.in_key(text[error.pos : error.pos + 1]):
            reason = f"is not valid JSON: this line has {lookalikes.named(character)}"
            raise unreadable(path, reason, _PLAIN, error.lineno) from None
        raise unreadable(path, f"is not valid JSON: {error.msg}", line=error.lineno) from None
    if not isinstance(value, dict):
        raise unreadable(path, "must be an object of keys and values")
    written = Written(str(path))
    for name, item, inner, offset in _json_members(text):
        line = text.count("\n", 0, offset) + 1
        for repeated in inner:
            reason = f"holds the key {repeated} twice in one object"
            written.problems.append(Problem(name, reason, "keep one of them", file=str(path), line=line))
        earlier = written.entries.get(name)
        if earlier is not None and earlier.line is not None:
            written.problems.append(_repeated(name, str(path), earlier.line, line))
        written.entries[name] = Entry(item, str(path), line)
    return written


def _json_members(text: str) -> list[tuple[str, Any, list[str], int]]:
    """Every member of the object that the valid JSON `text` is, repeated ones included.

    Its name, its value, the names that an object inside the value has more than once, and the offset of the member.
    """
    repeated: list[str] = []

    def mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(name for name, _ in pairs)
        repeated.extend(name for name, count in counts.items() if count > 1)
        return dict(pairs)

    decoder, space = json.JSONDecoder(object_pairs_hook=mapping), re.compile(r"[\s,:]*")

    def after_space(offset: int) -> int:
        match = space.match(text, offset)
        assert match is not None
        return match.end()

    members = []
    offset = after_space(text.index("{") + 1)
    while text[offset] != "}":
        name, end = decoder.raw_decode(text, offset)
        value, end = decoder.raw_decode(text, after_space(end))
        members.append((name, value, repeated.copy(), offset))
        repeated.clear()
        offset = after_space(end)
    return members


def _add_words(written: Written, words: list[str], knows: Callable[[str], bool]) -> None:
    """Add `key=value`, `--key value`, `--key=value`, `--key` (true) and `--no_key` (false); a later word wins."""
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        name, equals, value = word.partition("=")
        is_flag = name.startswith("--")
        if not is_flag and (not equals or not name):
            written.problems.append(_stray(word))
            continue
        if is_flag:
            name = name[2:].replace("-", "_")
        if equals:
            _add(written, name, Text(value))
        elif position < len(words) and not starts_key(words[position], knows):
            _add(written, name, Text(words[position]))
            position += 1
        elif name.startswith("no_") and not knows(name) and knows(name[3:]):
            _add(written, name[3:], False)
        else:
            _add(written, name, True)


def _stray(word: str) -> Problem:
    if word.endswith(SUFFIXES):
        return Problem(
            word, "a run file must be the first argument", "give one run file, before all overrides", file=COMMAND_LINE
        )
    if word.startswith("="):
        return Problem(
            word, "no key stands before the equals sign", "write key=value without spaces", file=COMMAND_LINE
        )
    return Problem(word, "this word belongs to no key", "write key=value or --key value", file=COMMAND_LINE)


def starts_key(word: str, knows: Callable[[str], bool]) -> bool:
    """Whether a word begins a key, so that it is not the value of a flag before it."""
    name, equals, _ = word.partition("=")
    return word.startswith("--") or (bool(equals) and knows(name.partition(".")[0]))


def _add(written: Written, name: str, value: Any) -> None:
    """Set one key; `a.b` sets `b` inside the mapping `a`, leaving the rest of the mapping."""
    top, *inner = name.split(".")
    if not inner:
        written.entries[name] = Entry(value, COMMAND_LINE)
        return
    earlier = written.entries[top].value if top in written.entries else {}
    try:
        root = place = _copy(parse_value(earlier) if isinstance(earlier, str) else earlier)
        for step in inner[:-1]:
            place = place.setdefault(step, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise Misfit(f"{top} holds no mapping that a key could be set in")
        place[inner[-1]] = parse_value(value) if isinstance(value, Text) else value
    except Misfit as misfit:
        written.problems.append(Problem(name, misfit.reason, misfit.remedy, value, True, COMMAND_LINE))
    else:
        written.entries[top] = Entry(root, COMMAND_LINE)


def _copy(value: Any) -> Any:
    return {name: _copy(item) for name, item in value.items()} if isinstance(value, Mapping) else value
