"""Which fields a form shows, from the table of keys: so a new key has its field by itself.

A key is shown if the run would read it with the values it has now: the keys of dpo appear with `stage: dpo`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from luthier.config.decode import Misfit, Text, decode
from luthier.config.describe import help_of, shown
from luthier.config.key_table import Key, catalog, keys_of, sections
from luthier.config.load import read_text
from luthier.config.sections import Section
from luthier.core.errors import ConfigError, LuthierError, Problem
from luthier.webui.document import values_of
from luthier.workflow.preflight import load_checked

Kind = Literal["switch", "choice", "number", "text"]
USUAL: Mapping[str, tuple[str, ...]] = {
    "train": (
        *("model_name_or_path", "template", "stage", "finetuning_type", "dataset_dir", "dataset", "output_dir"),
        *("learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"),
        *("gradient_accumulation_steps", "cutoff_len", "max_samples", "lora_rank", "lora_alpha", "lora_target"),
        *("quantization_bit", "pref_loss", "pref_beta", "adapter_name_or_path", "lr_scheduler_type", "warmup_steps"),
        *("logging_steps", "save_steps", "save_strategy", "eval_dataset", "val_size", "eval_strategy", "eval_steps"),
        *("bf16", "packing", "seed", "overwrite_output_dir"),
    ),
    "export": (
        *("model_name_or_path", "adapter_name_or_path", "template", "finetuning_type", "export_dir", "export_size"),
        *("export_device", "export_quantization_bit", "export_legacy_format", "infer_dtype", "trust_remote_code"),
    ),
    "eval": (
        *("model_name_or_path", "adapter_name_or_path", "template", "finetuning_type", "task", "compare", "save_dir"),
        *("metrics", "dataset_dir", "dataset", "eval_dataset", "val_size", "max_samples", "task_dir", "n_shot", "lang"),
        *("batch_size", "max_new_tokens", "do_sample", "seed", "judge_url", "judge_model", "quantization_bit"),
    ),
}
"""The keys that most people set. They stand first and open; the others are below, by topic."""
FOLDER_KEYS = {"train": "output_dir", "export": "export_dir", "eval": "save_dir"}
"""The key that says where a command writes to."""
FEWEST = 3
"""A topic with fewer keys has no heading of its own."""
OTHER = "other"
"""The group of their keys, which stands last."""
_DATASETS = ("dataset", "eval_dataset")
FILE_NAME = "run.yaml"
"""How a text that has no file yet is called in messages."""


@dataclass(frozen=True, slots=True)
class Field:
    name: str
    kind: Kind
    choices: tuple[str, ...]
    default: str
    """As it would be written; `null` if nothing is set."""
    help: str
    is_text: bool
    """Whether a number that is typed here is meant as text."""


@dataclass(frozen=True, slots=True)
class Group:
    name: str
    fields: tuple[Field, ...]


def groups(command: str, values: Mapping[str, str]) -> list[Group]:
    """The usual keys, then the others by topic. `values`: what is in the fields now."""
    switches = {section.key: _value(section.key, values) for section in sections() if section.key}
    usual, found = USUAL[command], dict[str, Field]()
    topics: dict[str, list[str]] = {}
    for section in sections():
        for key, field in _fields_of(section):
            if key.name not in found and _is_shown(key, section, command, switches):
                found[key.name] = field
                topics.setdefault(section.name, []).append(key.name)
    rest: dict[str, list[Field]] = {}
    for topic, keys in topics.items():
        for name in keys:
            if name not in usual:
                rest.setdefault(topic if len(keys) >= FEWEST else OTHER, []).append(found[name])
    first = Group("usual", tuple(found[name] for name in usual if name in found))
    topics_in_order = sorted(rest, key=lambda topic: topic == OTHER)
    return [first, *(Group(topic, tuple(rest[topic])) for topic in topics_in_order)]


def usual_fields(command: str) -> list[Field]:
    """The fields of the usual keys, also of those that the run would not read now."""
    return [field_of(catalog()[name][0]) for name in USUAL[command]]


def _is_shown(key: Key, section: Section, command: str, switches: Mapping[str, Any]) -> bool:
    is_usual_name = key.status == "renamed" and key.name in USUAL[command]
    if key.status != "supported" and not is_usual_name:
        return False
    is_switch = key.name == section.key and command in section.commands
    return is_switch or section.reads(command, switches, os.environ)


def _value(name: str, values: Mapping[str, str]) -> Any:
    """The value of a key that decides which others are read, or its default if it is none of its type."""
    key = catalog()[name][0]
    try:
        return decode(Text(values[name]), key.type, key.choices) if name in values else key.default
    except Misfit:
        return key.default


@cache
def _fields_of(section: Section) -> tuple[tuple[Key, Field], ...]:
    return tuple((key, field_of(key)) for key in keys_of(section))


def field_of(key: Key) -> Field:
    members = [part for part in (get_args(key.type) or (key.type,)) if part is not NoneType]
    if get_origin(key.type) is Literal:
        members = [key.type]
    choices = key.choices or tuple(str(value) for part in members for value in _literals(part))
    kind: Kind = "text"
    if choices and get_origin(key.type) is not tuple:
        kind = "choice"
    elif key.type is bool:
        kind = "switch"
    elif members == [bool]:
        kind, choices = "choice", ("true", "false")
    elif set(members) <= {int, float}:
        kind = "number"
    return Field(
        name=key.name,
        kind=kind,
        choices=choices,
        default="" if key.is_required else shown(key.default),
        help=help_of(key),
        is_text=not any(part in (int, float, bool) for part in members),
    )


def _literals(part: Any) -> Sequence[Any]:
    return get_args(part) if get_origin(part) is Literal else ()


def is_name(key: str) -> bool:
    """Whether `suggestions` may have values for this key."""
    return key in ("template", *_DATASETS)


def suggestions(name: str, values: Mapping[str, str]) -> tuple[str, ...]:
    """Values that exist here, for keys whose values are names."""
    if name == "template":
        from luthier.data.templates import template_names

        return ("auto", *template_names())
    if name in _DATASETS:
        from luthier.data.sources.catalog import load_catalog

        try:
            return load_catalog(values.get("dataset_dir") or catalog()["dataset_dir"][0].default).names
        except LuthierError:  # it is reported at `dataset_dir`
            return ()
    return ()


@dataclass(frozen=True, slots=True)
class Checked:
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()

    def at(self, name: str) -> list[Problem]:
        """The problems and warnings of one key."""
        return [problem for problem in (*self.problems, *self.warnings) if problem.key.partition(".")[0] == name]


def check(text: str, command: str) -> Checked:
    """What `luthier check` finds in the text of a run file, for a run that would start now."""
    try:
        run = load_checked(command, read_text(text, FILE_NAME), begins=True)
    except ConfigError as error:
        return Checked(error.problems, error.warnings)
    except LuthierError as error:
        return Checked((Problem("run file", str(error)),))
    return Checked((), run.warnings)


def folder_in(text: str, command: str) -> str:
    """The folder that the run will write to; empty if the text does not say."""
    return values_of(text).get(FOLDER_KEYS[command], "").strip()
