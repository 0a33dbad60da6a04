"""Write `luthier/config/keys/hf_training_keys.json` from the installed transformers.

`python -m tools.training_keys [--check]`
"""

import dataclasses
import enum
import json
import sys
import types
import typing
from typing import Any

from luthier.config.keys.training import TABLE, TYPES

OVERRIDES: dict[str, dict[str, Any]] = {
    # Steps are whole numbers, or a share of all steps; the annotation there says float only.
    "save_steps": {"type": "int | float"},
    "eval_steps": {"type": "int | float | None"},
    "logging_steps": {"type": "int | float"},
    "warmup_steps": {"type": "int | float"},
    "eval_delay": {"type": "int | float"},
    # A comma list in a run file, whatever it says there.
    "report_to": {"type": "list", "default": ["none"]},
    "resume_from_checkpoint": {"type": "bool | str | None"},
    "include_num_input_tokens_seen": {"type": "bool | str", "choices": ("all", "non_padding", "no")},
    "debug": {"type": "str"},
    # A path in a run file, or a mapping; never a Python object.
    "generation_config": {"type": "str | None"},
    "parallelism_config": {"type": "dict | None"},
    "trackio_static_space_id": {"type": "bool | str | None"},
    # Files for older transformers say `fsdp: full_shard auto_wrap`, `fsdp: [full_shard]` or `fsdp: true`.
    "fsdp": {"type": "bool | list | str | None"},
}


def spell(annotation: Any) -> tuple[str, tuple[str, ...]]:
    """The type in the words of `luthier.config.keys.training.TYPES`, and the choices if it is an enumeration."""
    members = typing.get_args(annotation) if isinstance(annotation, types.UnionType) else (annotation,)
    members = typing.get_args(annotation) if typing.get_origin(annotation) is typing.Union else members
    words: set[str] = set()
    choices: tuple[str, ...] = ()
    for member in members:
        if isinstance(member, type) and issubclass(member, enum.Enum):
            choices = tuple(str(item.value) for item in member)
            words.add("str")
        elif member is type(None):
            words.add("None")
        else:
            words.add((typing.get_origin(member) or member).__name__)
    order = ("bool", "int", "float", "dict", "list", "str", "None")
    return " | ".join(word for word in order if word in words), choices


def trackers() -> tuple[str, ...]:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    return ("none", "all", *sorted(INTEGRATION_TO_CALLBACK))


def table() -> dict[str, Any]:
    """The whole file, as read back by `luthier.config.keys.training`."""
    import transformers

    keys: dict[str, Any] = {}
    for field in dataclasses.fields(transformers.Seq2SeqTrainingArguments):
        override = OVERRIDES.get(field.name, {})
        makes_default: Any = field.default_factory
        default = makes_default() if field.default is dataclasses.MISSING else field.default
        spelled, choices = spell(field.type) if "type" not in override else (override["type"], ())
        assert spelled in TYPES, f"{field.name}: {spelled} is not a type of luthier.config.keys.training.TYPES"
        row = {"type": spelled, "default": override.get("default", default)}
        choices = choices or override.get("choices") or tuple(field.metadata.get("choices") or ())
        if field.name == "report_to":
            choices = trackers()
        if choices:
            row["choices"] = list(choices)
        keys[field.name] = row
    return {"transformers": transformers.__version__, "keys": keys}


def main(argv: list[str]) -> int:
    text = json.dumps(table(), indent=1, ensure_ascii=False) + "\n"
    if "--check" in argv:
        same = TABLE.read_text(encoding="utf-8") == text
        print(
            f"{TABLE.name} is up to date"
            if same
            else f"{TABLE.name} is out of date: run `python -m tools.training_keys`"
        )
        return 0 if same else 1
    TABLE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
