"""transformers' TrainingArguments, built from the frozen run just before training."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from luthier.config.keys.legacy import training_arguments_kwargs
from luthier.config.keys.sharding import GATHERS, zero_settings
from luthier.config.keys.training import read_mapping
from luthier.config.masking import is_secret
from luthier.config.rules.optim import NEEDS_ACCELERATOR, WITHOUT_WARM_UP
from luthier.core.errors import InvalidInput, LuthierError, MissingExtra
from luthier.core.log import warn
from luthier.core.machine import Machine
from luthier.model.backends import backend_of
from luthier.model.dtype import autocast_of_training
from luthier.training.fp8 import switch_on

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import Seq2SeqTrainingArguments, TrainerCallback, TrainingArguments

    from luthier.config.runs import TrainRun


def training_arguments(
    run: "TrainRun", machine: Machine, kind: Any = None, more: Mapping[str, Any] = MappingProxyType({})
) -> "Seq2SeqTrainingArguments":
    """The user's training keys, and the few values that luthier always sets itself.

    `kind`: a class of another library that has the arguments of transformers and others, which `more` holds.
    Raises `InvalidInput` for what this machine or the installed transformers cannot do.
    """
    from transformers import Seq2SeqTrainingArguments

    _check_machine(run, machine)
    values = training_arguments_kwargs(run.training)
    values |= {
        "do_train": run.trains,
        # Rows carry exactly what the collator of the stage needs.
        "remove_unused_columns": False,
        # luthier has its own progress bar and sets up the trackers itself.
        "disable_tqdm": True,
        "report_to": "none",
        "prediction_loss_only": True,
        # A loss that is not finite stops the run; hiding it would let a broken model train on.
        "logging_nan_inf_filter": False,
    }
    if machine.device == "cpu":
        values |= {"use_cpu": True, "dataloader_pin_memory": False}
    elif run.training["dataloader_pin_memory"]:
        values["accelerator_config"] = _without_waiting(run.training["accelerator_config"])
    needs_metric = run.finetuning.early_stopping_steps is not None or run.training["save_strategy"] == "best"
    if needs_metric and run.training["metric_for_best_model"] is None:
        values["metric_for_best_model"] = "loss"
    if run.training["ddp_find_unused_parameters"] is None:
        # The loss uses the output head after the forward pass, so a search there would take its weight for unused.
        values["ddp_find_unused_parameters"] = False
    values |= {**for_engine(values, machine), **more}
    if machine.device == "cpu":
        join_on_cpu(run.training["ddp_timeout"])
    try:
        args: Seq2SeqTrainingArguments = on_one_device((kind or Seq2SeqTrainingArguments)(**values))
    except (ValueError, TypeError) as error:
        raise InvalidInput(f"{run.source}: transformers does not accept these training keys: {error}") from error
    except ImportError as error:
        raise MissingExtra(f"{run.source}: a training key needs a library that is not installed: {error}") from error
    if run.fp8.fp8:
        switch_on(args, run.fp8, machine)
    backend_of(run).prepare_arguments(args, run, machine)
    return args


def save(args: "TrainingArguments", file: Path) -> None:
    """As transformers does, but without secrets: `push_to_hub` uploads the file with the weights."""
    import torch

    shown = copy(args)
    for name in vars(shown):
        if is_secret(name):
            setattr(shown, name, None)
    torch.save(shown, file)


def _check_machine(run: "TrainRun", machine: Machine) -> None:
    require_groups(run.parallel.sp_size, machine.world_size)
    require_one_group(run.parallel.tp_size, machine.world_size)
    if run.training["fp16"] and machine.device == "cpu":
        raise InvalidInput(
            "fp16: true: half precision training needs an accelerator, and this machine has none"
            " -> bf16: true, or leave it out"
        )
    if run.trains and run.training["optim"] in NEEDS_ACCELERATOR and machine.device == "cpu":
        raise InvalidInput(
            f"optim: {run.training['optim']}: its library needs an accelerator, and this machine has none"
            " -> choose another optim"
        )
    if run.trains and machine.device != "cpu" and not is_in_16_bits(run):
        warn(
            "neither bf16 nor fp16 is set, so weights and computation are in float32, which takes twice"
            f" the memory and more time -> set {'bf16' if machine.bf16 else 'fp16'}: true"
        )


def _without_waiting(accelerator_config: Any) -> Any:
    """The key, with batches copied from pinned memory while the host goes on. Its own value and a file stay as they
    are."""
    if isinstance(accelerator_config, str):
        return accelerator_config
    return {"non_blocking": True, **(accelerator_config or {})}


def tell_long_warm_up(args: "TrainingArguments", num_steps: int) -> None:
    """Warns of a training that ends before its learning rate has warmed up."""
    num_warm_up = args.get_warmup_steps(num_steps)
    if num_warm_up >= num_steps and args.lr_scheduler_type not in WITHOUT_WARM_UP:
        warn(
            f"the warm-up ends with step {num_warm_up} and training with step {num_steps}, so the learning rate never"
            f" reaches {args.learning_rate} -> lower warmup_steps (or warmup_ratio)"
        )


def on_one_device(args: Any) -> Any:
    """transformers would use DataParallel, which cuts all tensors of a batch along their first dimension."""
    if args.n_gpu > 1:
        warn(f"this process trains on one of {args.n_gpu} devices -> luthier train uses all, with a process for each")
        args._n_gpu = 1
    return args


def require_groups(sp_size: int, num_processes: int) -> None:
    """Raises `InvalidInput` if the processes of this run cannot form groups that share the tokens of their batches."""
    if num_processes % sp_size:
        there = "is one process" if num_processes == 1 else f"are {num_processes} processes"
        raise InvalidInput(
            f"sp_size: {sp_size} processes share the tokens of a batch, and there {there} -> start a multiple of"
            f" {sp_size}, for example with FORCE_TORCHRUN=1 NPROC_PER_NODE={sp_size}"
        )


def require_one_group(tp_size: int, num_processes: int) -> None:
    """Raises `InvalidInput` unless all processes of this run share the layers of one model, or none do."""
    if tp_size not in (1, num_processes):
        there = "is one process" if num_processes == 1 else f"are {num_processes} processes"
        raise InvalidInput(
            f"tp_size: {tp_size} processes share each layer, and there {there} -> start {tp_size}, for example with"
            f" FORCE_TORCHRUN=1 NPROC_PER_NODE={tp_size}"
        )


def for_engine(values: Mapping[str, Any], machine: Machine) -> dict[str, Any]:
    """The settings of FSDP and DeepSpeed in `values`, as this machine needs them."""
    changed: dict[str, Any] = {}
    if values.get("deepspeed") is not None:
        changed["deepspeed"] = gathering(read_mapping("deepspeed", values["deepspeed"]))
    if machine.device == "cpu" and (values.get("fsdp_config") or {}).get("cpu_offload"):
        warn("fsdp: offloading is left out, since the weights are in the memory of the CPU on this machine anyway")
        changed["fsdp_config"] = {**values["fsdp_config"], "cpu_offload": False}
    return changed


def gathering(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of DeepSpeed with which ZeRO-3 saves whole weights; by itself it leaves them in its own files."""
    zero = zero_settings(settings)
    if zero.get("stage") != 3:
        return dict(settings)
    return {**settings, "zero_optimization": {GATHERS: True, **zero}}


def join_on_cpu(timeout_seconds: float) -> None:
    """Meet the other processes of a run on CPUs; transformers gives their collectives no `ddp_timeout`."""
    from torch import distributed

    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout_seconds))


def is_in_16_bits(run: "TrainRun") -> bool:
    return bool(run.training["bf16"] or run.training["fp16"] or run.finetuning.pure_bf16)


def autocast_of(args: "TrainingArguments", model: "nn.Module") -> "torch.autocast":
    """The autocast of the run, for a forward pass of `model` outside the trainer."""
    import torch

    half = {(True, False): torch.bfloat16, (False, True): torch.float16}.get((args.bf16, args.fp16))
    return autocast_of_training(model, half)


def trackers(report_to: Any) -> "list[TrainerCallback]":
    """One callback per tracker named by `report_to`. Raises `MissingExtra` for one whose library is not installed."""
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks

    names = [report_to] if isinstance(report_to, str) else list(report_to or ())
    if names == ["all"]:
        names = get_available_reporting_integrations()
    os.environ.setdefault("WANDB_PROJECT", "luthier")
    callbacks = []
    for name in names:
        if name == "none":
            continue
        try:
            (tracker,) = get_reporting_integration_callbacks([name])
            callbacks.append(tracker())
        except (RuntimeError, ImportError) as error:
            # transformers' trackers raise one of these if their library is missing.
            raise MissingExtra(
                f"report_to: {name} needs a library that is not installed: pip install {name} ({error})"
            ) from error
    return callbacks


@contextmanager
def accepted(key: str, value: str) -> Iterator[None]:
    """Wraps a library call that validates the keys of an optimizer or a schedule. Raises `InvalidInput`."""
    try:
        yield
    except LuthierError:  # luthier's own optimizers name the wrong key themselves
        raise
    except (ValueError, TypeError, ImportError) as fault:
        raise InvalidInput(f"{key}: {value}: cannot be used with this configuration: {fault}") from fault


def require_batch(run: "TrainRun", num_processes: int, num_rows: int) -> None:
    """Raises `InvalidInput` if `dataloader_drop_last` leaves nothing to train on."""
    size = run.training["per_device_train_batch_size"] * num_processes // (run.parallel.sp_size * run.parallel.tp_size)
    if run.training["dataloader_drop_last"] and num_rows < size:
        raise InvalidInput(
            f"dataloader_drop_last: {num_rows} rows are fewer than a batch, which has {size}, so all would be left out"
            " -> leave it out, or lower per_device_train_batch_size"
        )
