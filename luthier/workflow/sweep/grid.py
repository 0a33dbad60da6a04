"""The runs of a sweep: every combination of the values that the command line names, each checked as `train` checks it.

luthier sweep RUN learning_rate=1e-4,3e-4 lora_rank=8,16     four runs
lora_target=[q_proj,v_proj],all                              two values, the first of them a list
lr_scheduler_kwargs={"num_cycles": 1},{"num_cycles": 2}      two mappings
num_train_epochs=2                                           an ordinary override of every run
"""

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from luthier.config.decode import NULL_WORDS
from luthier.config.key_table import catalog
from luthier.config.keys.ray import RAY_KEYS
from luthier.config.load import read_source
from luthier.config.runs import TrainRun
from luthier.config.source import Entry, is_file_name, starts_key
from luthier.core.errors import ConfigError, InvalidInput, Problem
from luthier.core.log import warn
from luthier.workflow.preflight import load_checked

MAX_VALUE_CHARS, MAX_NAME_CHARS = 40, 180
HASH_CHARS = 6
_OPENING, _CLOSING, _QUOTES = "[{(", "]})", "\"'"


@dataclass(frozen=True, slots=True)
class Axis:
    """A key with several values, as the words of the command line have them."""

    key: str
    values: tuple[str, ...]
    position: int
    """Of its word on the command line."""
    prefix: str
    """What stands before the value in this word: `lora_rank=`, or nothing after `--lora_rank`."""


@dataclass(frozen=True, slots=True)
class GridRun:
    """One run of the grid."""

    name: str
    values: Mapping[str, str]
    """Key -> its value in this run, as it was written."""
    run: TrainRun

    @property
    def folder(self) -> Path:
        return Path(self.run.training["output_dir"])

    def keys(self) -> dict[str, Any]:
        """Those of its process, whoever starts it."""
        keys = {name: value for name, value in self.run.given.items() if name not in RAY_KEYS}
        return keys | {"output_dir": str(self.folder.absolute())}


def split_values(text: str) -> list[str]:
    """`a,b` -> a and b. Brackets and quotes keep commas together; quotes around a value are removed.

    >>> split_values("[q_proj,v_proj],all")
    ['[q_proj,v_proj]', 'all']
    """
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in _QUOTES and (depth or not parts[-1].strip()):
            quote = character
        elif character == "," and depth == 0:
            parts.append("")
            continue
        depth += 0 if quote else (character in _OPENING) - (character in _CLOSING)
        parts[-1] += character
    return [_unquoted(part.strip()) for part in parts] if len(parts) > 1 else [text]


def _unquoted(text: str) -> str:
    return text[1:-1] if len(text) > 1 and text[0] in _QUOTES and text[-1] == text[0] else text


def axes_of(words: Sequence[str]) -> list[Axis]:
    """The keys with several values, in the order of the command line. Raises `InvalidInput` if there are none."""
    axes: list[Axis] = []
    for position, word in enumerate(words):
        if position == 0 and is_file_name(word):
            continue
        before = words[position - 1] if position else ""
        name, equals, value = word.partition("=")
        if before.startswith("--") and "=" not in before and not starts_key(word, catalog().__contains__):
            name, prefix, value = before, "", word
        elif equals:
            prefix = f"{name}="
        else:
            continue
        if len(values := split_values(value)) > 1:
            axes.append(Axis(name.removeprefix("--").replace("-", "_"), tuple(values), position, prefix))
    _check(axes)
    return axes


def _check(axes: Sequence[Axis]) -> None:
    keys = [axis.key for axis in axes]
    if not axes:
        raise InvalidInput(
            "sweep: no key has several values -> write them with commas, e.g. learning_rate=1e-4,3e-4, or use"
            " `luthier train` for one run"
        )
    for axis in axes:
        if axis.key == "output_dir":
            raise InvalidInput("sweep: output_dir: is one folder, in which each run gets its own -> name one")
        if keys.count(axis.key) > 1:
            raise InvalidInput(f"sweep: {axis.key}: has several values twice -> write all of them once")
        if "" in axis.values:
            raise InvalidInput(f"sweep: {axis.key}: a value between the commas is empty -> remove the extra comma")


def grid(words: Sequence[str]) -> list[GridRun]:
    """Every combination of the values, the last key changing fastest. Raises `ConfigError` with the faults of all."""
    axes = axes_of(words)
    keys = [axis.key for axis in axes]
    products = itertools.product(*(axis.values for axis in axes))
    combinations = [dict(zip(keys, values, strict=True)) for values in products]
    names = unique_names(combinations)
    runs: list[GridRun] = []
    faults: dict[str, list[Problem]] = {}
    warnings: dict[str, Problem] = {}
    source = ""
    for name, values in zip(names, combinations, strict=True):
        try:
            run = _load(_words(words, axes, values), name)
        except ConfigError as error:
            source = error.source
            for problem in error.problems:
                faults.setdefault(str(problem), []).append(problem)
            found = error.warnings
        else:
            runs.append(GridRun(name, values, run))
            found = run.warnings
        warnings |= {str(warning): warning for warning in found}
    if faults:
        problems = [_as_one(same, axes, len(combinations)) for same in faults.values()]
        raise ConfigError(source, problems, warnings.values())
    for text in warnings:
        warn(text)
    _require_different(runs)
    return runs


def _words(words: Sequence[str], axes: Sequence[Axis], values: Mapping[str, str]) -> list[str]:
    changed = {axis.position: axis.prefix + values[axis.key] for axis in axes}
    return [changed.get(position, word) for position, word in enumerate(words)]


def _load(words: Sequence[str], name: str) -> TrainRun:
    """The run of one combination. Its folder is inside that of the sweep, and what is there already goes on."""
    written = read_source(words)
    output_dir = written.entries.get("output_dir")
    if output_dir is not None and isinstance(output_dir.value, str) and output_dir.value not in ("", *NULL_WORDS):
        written.entries["output_dir"] = replace(output_dir, value=str(Path(output_dir.value).expanduser() / name))
    written.entries["overwrite_output_dir"] = Entry(False, "luthier sweep")
    run = load_checked("train", written, begins=True)
    assert isinstance(run, TrainRun)
    return run


def _as_one(same: Sequence[Problem], axes: Sequence[Axis], num_runs: int) -> Problem:
    """One problem of several runs, with their number unless its key and value say which runs they are."""
    sizes = {axis.key: len(axis.values) for axis in axes}
    if len(same) == num_runs or len(same) == num_runs // sizes.get(same[0].key, num_runs + 1):
        return same[0]
    return replace(same[0], reason=f"{same[0].reason} (in {len(same)} of the {num_runs} runs)")


def _require_different(runs: Sequence[GridRun]) -> None:
    """Raises `InvalidInput` if two spellings, such as 1e-4 and 0.0001, make one run."""
    for first, second in itertools.combinations(runs, 2):
        own, other = ({k: v for k, v in one.run.given.items() if k != "output_dir"} for one in (first, second))
        if own == other:
            raise InvalidInput(f"sweep: {first.name} and {second.name} are the same run -> write each value once")


def unique_names(combinations: Sequence[Mapping[str, str]]) -> list[str]:
    """A name for each run that a shell, a path and a page can hold: `learning_rate-1e-4_lora_rank-8`."""
    names = [_name(values) for values in combinations]
    return [
        name if names.count(name) == 1 and len(name) <= MAX_NAME_CHARS else f"{name[:MAX_NAME_CHARS]}_{_digest(values)}"
        for name, values in zip(names, combinations, strict=True)
    ]


def _name(values: Mapping[str, str]) -> str:
    return "_".join(f"{key}-{_slug(value)}" for key, value in values.items())


def _slug(value: str) -> str:
    """The last part of a path; characters that mean something to a shell or a URL become hyphens."""
    last = value.rstrip("/").rpartition("/")[2] if "/" in value and value[0] not in _OPENING else value
    return re.sub(r"[^A-Za-z0-9.+]+", "-", last).strip("-.")[:MAX_VALUE_CHARS] or "empty"


def _digest(values: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(values.items())).encode()).hexdigest()[:HASH_CHARS]
