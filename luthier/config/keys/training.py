"""The keys of `transformers.TrainingArguments`, known without importing it.

`hf_training_keys.json` is written by `python -m tools.training_keys` from the installed transformers; a test compares.
Their help is our own and stands in `training_help.toml`.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from luthier.core.errors import InvalidInput
from luthier.core.paths import absent_remedy

TABLE = Path(__file__).with_name("hf_training_keys.json")

BY_LENGTH = ("group_by_length", "batch_rebalance")
"""The values of `train_sampling_strategy` that put rows of like lengths together."""
COMPILING = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
"""Any of these keys compiles the model."""
TYPES: dict[str, Any] = {
    "bool": bool,
    "bool | None": bool | None,
    "int": int,
    "int | None": int | None,
    "float": float,
    "float | None": float | None,
    "int | float": int | float,
    "int | float | None": int | float | None,
    "str": str,
    "str | None": str | None,
    "bool | str": bool | str,
    "bool | str | None": bool | str | None,
    "bool | list | str | None": bool | tuple[str, ...] | str | None,
    "dict | None": dict[str, Any] | None,
    "dict | str | None": dict[str, Any] | str | None,
    "dict | list | str | None": dict[str, Any] | tuple[str, ...] | str | None,
    "list": tuple[str, ...],
    "list | None": tuple[str, ...] | None,
    "list | str | None": tuple[str, ...] | str | None,
}
"""How the table spells types; `list` is a comma list of texts."""

_REMEDY = "correct the path of the JSON file, from the folder where the command runs, or write the mapping itself"
_CHECKPOINTING = (
    "layers are recomputed unless disable_gradient_checkpointing is true; use_reentrant_gc chooses the implementation"
)
_SUMS = "an evaluation adds up sums batch by batch and keeps nothing else"
_NO_EFFECT = {
    "remove_unused_columns": "rows have exactly the columns that their stage needs",
    "label_names": "the stage knows where its labels are",
    "gradient_checkpointing": _CHECKPOINTING,
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "activation_checkpointing": _CHECKPOINTING,
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "average_tokens_across_devices": "a loss is always divided by its units over all devices and micro-steps",
    "local_rank": "the launcher sets it",
    "disable_tqdm": "the progress bar is drawn in a terminal only",
    "logging_nan_inf_filter": "a loss that is not a number stops the run",
    "prediction_loss_only": _SUMS,
    "eval_accumulation_steps": _SUMS,
    "eval_do_concat_batches": _SUMS,
    "eval_use_gather_object": _SUMS,
    "batch_eval_metrics": _SUMS,
    "include_for_metrics": _SUMS,
    "bf16_full_eval": "an evaluation computes as training does",
    "fp16_full_eval": "an evaluation computes as training does",
    "length_column_name": "the lengths of rows are counted, whatever their columns are",
    "sortish_sampler": "transformers no longer reads it",
    "generation_max_length": "max_new_tokens and max_length limit these answers, too",
    "generation_config": "the keys of generation hold for these answers, too",
}
_FULFILLED: dict[str, Any] = {
    "remove_unused_columns": False,
    "gradient_checkpointing": True,
    "activation_checkpointing": True,
    "prediction_loss_only": True,
    "logging_nan_inf_filter": False,
}
"""Values that ask for what happens anyway."""
_LIGER = {
    "status": "refused",
    "reason": "brings a fused loss over all positions, and the loss here is computed at labeled positions only",
    "remedy": "set enable_liger_kernel: true, which takes the other kernels of the library",
}
NOTES: dict[str, dict[str, Any]] = {
    "use_liger_kernel": _LIGER,
    "liger_kernel_config": _LIGER,
    **{
        name: {"status": "no_effect", "reason": reason, "allowed": (_FULFILLED[name],) if name in _FULFILLED else ()}
        for name, reason in _NO_EFFECT.items()
    },
    "parallelism_config": {
        "status": "refused",
        "reason": "takes a Python object, which a run file cannot hold",
        "remedy": "use fsdp, deepspeed or sp_size",
    },
}
"""What luthier does differently with some of these keys; see `luthier.config.keys.fields` for the words."""


@dataclass(frozen=True, slots=True)
class TrainingEntry:
    """One row of the table."""

    type: Any
    default: Any
    choices: tuple[str, ...]


@cache
def training_table() -> Mapping[str, TrainingEntry]:
    """Name -> type, default and choices of every key of the installed `TrainingArguments`."""
    table = json.loads(TABLE.read_text(encoding="utf-8"))["keys"]
    return {
        name: TrainingEntry(TYPES[row["type"]], _frozen(row["default"]), tuple(row.get("choices", ())))
        for name, row in table.items()
    }


def _frozen(default: Any) -> Any:
    return tuple(default) if isinstance(default, list) else default


OWN_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "overwrite_output_dir": False,
        "warmup_ratio": 0.0,
        "fsdp_min_num_params": 0,
        "fsdp_transformer_layer_cls_to_wrap": None,
    }
)
"""Keys of older transformers that this version still reads; see `luthier.config.keys.legacy`."""


@dataclass(frozen=True, slots=True, eq=False)
class TrainingKeys(Mapping[str, Any]):
    """The `TrainingArguments` keys of one run: what the user gave, else the default. Lists are tuples."""

    given: Mapping[str, Any]
    """Only those that the user wrote."""

    def changed(self, keys: Mapping[str, Any], without: Collection[str] = ()) -> "TrainingKeys":
        """As if the user had written `keys` too, and none of those in `without`."""
        kept = {name: value for name, value in self.given.items() if name not in without}
        return TrainingKeys(MappingProxyType({**kept, **keys}))

    def __getitem__(self, name: str) -> Any:
        if name in self.given:
            return self.given[name]
        return OWN_DEFAULTS[name] if name in OWN_DEFAULTS else training_table()[name].default

    def __iter__(self) -> Iterator[str]:
        yield from training_table()
        yield from OWN_DEFAULTS

    def __len__(self) -> int:
        return len(training_table()) + len(OWN_DEFAULTS)


def read_mapping(key: str, value: Any) -> Mapping[str, Any]:
    """The mapping that a key gives, itself or as the name of a JSON file; empty for nothing. Raises `InvalidInput`."""
    if not value or isinstance(value, Mapping):
        return value or {}
    try:
        content = json.loads(Path(value).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InvalidInput(f"{key}: {value}: no such file -> {absent_remedy(value, _REMEDY)}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidInput(f"{key}: {value}: not JSON ({error}) -> {_REMEDY}") from error
    except OSError as error:
        raise InvalidInput(f"{key}: {value}: cannot be read ({error.strerror}) -> {_REMEDY}") from error
    if not isinstance(content, dict):
        raise InvalidInput(f"{key}: {value}: must hold a JSON object -> {_REMEDY}")
    return content
