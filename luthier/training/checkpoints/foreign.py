"""Checkpoints that transformers' Trainer wrote, such as those of LLaMA-Factory: adapters and full models.

They hold no manifest, so their files are checked by what they say of themselves. Weights, optimizer, learning rate
schedule, random numbers and the step are taken over; everything else comes from the run file. What cannot be taken over
is named. `training_args.bin` is a pickle, which could run any code: it is never opened.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

from luthier.core.errors import ModelError, OutputError
from luthier.core.manifest import MANIFEST_NAME
from luthier.model.files.sources import ADAPTER_WEIGHTS, read_safetensors_header

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainingArguments

TRAINER_STATE, PICKLE = "trainer_state.json", "training_args.bin"
OWN_ENTRY = "trained_on"
"""In `stateful_callbacks` of every state that luthier writes (`luthier.training.checkpoints.trained_on`)."""
WEIGHT_PATTERNS = ("adapter_model.*", "model*.safetensors", "pytorch_model*.bin")
SHARD_PATTERNS = ("global_step*", "pytorch_model_fsdp*")
"""What DeepSpeed and FSDP write in place of whole weights."""
ADAPTER_KEYS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "fan_in_fan_out", "oft_block_size")
"""Of adapter_config.json: the settings besides the layers that decide what an adapter computes."""


def is_foreign(folder: Path) -> bool:
    """Whether another program than luthier wrote this checkpoint. False for one of luthier that lost its manifest."""
    state = _state_of(folder)
    if not isinstance(state.get("global_step"), int) or (folder / MANIFEST_NAME).exists():
        return False
    callbacks = state.get("stateful_callbacks")
    return not (isinstance(callbacks, Mapping) and OWN_ENTRY in callbacks)


def _state_of(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def is_readable_foreign(folder: Path) -> bool:
    """As `is_foreign`. Raises `OutputError` for one with a file that is cut off, or without weights."""
    if not is_foreign(folder):
        return False
    key = f"resume_from_checkpoint: {folder}"
    if not any(any(folder.glob(pattern)) for pattern in (*WEIGHT_PATTERNS, *SHARD_PATTERNS)):
        raise OutputError(f"{key}: holds no weights -> copy the whole checkpoint, or choose an earlier one")
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            try:
                read_safetensors_header(path)
            except ModelError as fault:
                raise OutputError(f"{key}: {fault}, or choose an earlier one") from fault
        elif path.suffix in (".pt", ".pth", ".bin") and path.name != PICKLE and not is_zipfile(path):
            raise OutputError(
                f"{key}: {path.name} is cut off, or was saved by a torch before 1.6 -> copy it again, or choose an"
                " earlier checkpoint"
            )
    return True


def require_same_adapter(folder: Path, policy: "nn.Module") -> None:
    """Raises `OutputError` if the adapter is on other layers than that of the run: optimizers go by their order."""
    from peft import PeftModel, get_peft_model_state_dict

    path = folder / ADAPTER_WEIGHTS[0]
    if not isinstance(policy, PeftModel) or not path.is_file():
        return
    there = read_safetensors_header(path).keys() - {"__metadata__"}
    here = get_peft_model_state_dict(policy).keys()
    if only := sorted(there - here) or sorted(here - there):
        where = "the checkpoint" if there - here else "this run"
        raise OutputError(
            f"resume_from_checkpoint: {folder}: its adapter is not on the layers that this run adapts ({only[0]} is in"
            f" {where} alone) -> set lora_target, additional_target and finetuning_type as in the run that saved it"
        )


def not_taken_over(folder: Path, policy: "nn.Module", args: "TrainingArguments") -> Iterator[str]:
    """What differs from continuing in the program that wrote it, one sentence each."""
    yield "another program wrote it, so its rows are not known: name the same data, seed and batch size"
    if (folder / PICKLE).is_file():
        yield f"{PICKLE} is not read, since a pickle could run any code: all settings are those of the run file"
    has_sharded, has_optimizer = any(folder.glob("global_step*")), any(folder.glob("optimizer*"))
    if has_sharded and not args.deepspeed:
        yield "the optimizer state in global_step*/ is DeepSpeed's: it restarts, unless deepspeed is set as it was"
    elif has_optimizer and not (folder / "scheduler.pt").is_file():
        yield "without scheduler.pt the optimizer state is not read either, so both restart"
    yield from _random_numbers(folder, args.world_size)
    yield from _adapter_settings(folder, policy)
    state = _state_of(folder)
    size = state.get("train_batch_size")
    if isinstance(size, int) and size != args.train_batch_size:
        yield f"its batches have {size} rows, and those of this run {args.train_batch_size}: other rows come next"
    unknown = sorted(set(state.get("stateful_callbacks") or {}) - {"TrainerControl", "EarlyStoppingCallback"})
    if unknown:
        yield f"the state of callbacks that luthier does not have is left out: {', '.join(unknown)}"


def _random_numbers(folder: Path, num_processes: int) -> Iterator[str]:
    num_saved = len(list(folder.glob("rng_state*.pth")))
    if num_saved and num_saved != num_processes:
        yield (
            f"its random numbers are those of {num_saved} processes, and this run has {num_processes}: dropout draws"
            " others"
        )


def _adapter_settings(folder: Path, policy: "nn.Module") -> Iterator[str]:
    from peft import PeftModel

    try:
        there = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if not isinstance(policy, PeftModel):
        return
    here = policy.peft_config[policy.active_adapter].to_dict()
    for name in ADAPTER_KEYS:
        if name in there and name in here and there[name] != here[name]:
            yield f"its adapter has {name} {there[name]}, and this run computes with {here[name]}"
