"""Luthier's own optimizers. Each file in this folder is one; its switch, e.g. `use_muon`, turns it on.

Without a switch transformers builds the optimizer of `optim`.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Condition, Rule, Rules, When, is_other_than, is_set, not_, warning
from luthier.config.rules.model import trains_adapter
from luthier.config.rules.recovery import applies_update_early
from luthier.core.kinds import OPTIMIZERS

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer
    from transformers import TrainingArguments

    from luthier.config.runs import TrainRun

ADAMW = ("adamw_torch", "adamw_torch_fused")
"""The values of `optim` that are AdamW in the dtype of the weights."""
DEFAULT_MAX_GRAD_NORM = 1.0
"""The default of transformers. It is written to `run.yaml`, so it does not count as set by the user."""
ANY_BASE = (*ADAMW, "adafactor", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
"""The values of `optim` that can step on proxy parameters instead of the weights."""
SMALLEST_OF_8_BITS = 4096
"""Tensors of fewer numbers have full states, in bitsandbytes and torchao."""


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps of a run that take the same memory and time, for its plan."""

    config: Any
    """With it each step of the optimizer is one of these."""
    share: float = 1.0
    """Of all steps."""


def one_phase(model: "nn.Module", args: "TrainingArguments", config: Any, num_steps: int) -> Sequence[Phase]:
    return (Phase(config),)


def renewing_phases(key: str) -> "Callable[[nn.Module, TrainingArguments, Any, int], Sequence[Phase]]":
    """Of an optimizer that computes new projections every so many steps, as `key` says."""

    def phases(model: "nn.Module", args: "TrainingArguments", config: Any, num_steps: int) -> Sequence[Phase]:
        share = -(-num_steps // getattr(config, key)) / num_steps
        renewing = Phase(replace(config, **{key: 1}), share)
        return (renewing,) if share == 1 else (renewing, Phase(replace(config, **{key: num_steps + 1}), 1 - share))

    return phases


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    name: str
    switch: str
    """The key that turns it on with any value except false and null."""
    config: type
    """The YAML keys that only this optimizer reads; `switch` is one of them."""
    build: "Callable[[nn.Module, TrainingArguments, Any], TorchOptimizer]"
    """(model, args, config) -> the optimizer of the trainable parameters."""
    check: Rules
    """Rules between keys that concern this optimizer; checked before torch is imported."""
    has_own_state: bool = True
    """Whether it keeps other numbers than the optimizer of `optim` would."""
    phases: "Callable[[nn.Module, TrainingArguments, Any, int], Sequence[Phase]]" = one_phase
    """(model, args, config, number of steps) -> the kinds of steps of a run."""
    frees_gradients: Callable[[Any], bool] = lambda config: False
    """(config) -> whether it steps in the backward pass and frees each gradient there."""
    freezes: bool = False
    """Whether it trains only a part of the weights at a time."""


def chosen(run: "TrainRun") -> "Callable[[nn.Module, TrainingArguments], TorchOptimizer] | None":
    """(model, args) -> the optimizer that is switched on in this run; None: the optimizer of `optim`."""
    for name, config in run.optimizers.items():
        return partial(OPTIMIZERS.get(name).build, config=config)
    return None


def only_optimizer(switch: str) -> Rule:
    """The optimizer is the only one of its run."""
    return Rule(
        (switch,),
        "another optimizer is switched on too",
        "keep one of them",
        lambda run: len(run.optimizers) > 1,
    )


def requires_whole_weights(switch: str) -> tuple[Rule, ...]:
    """The optimizer reads rows, columns or all of a weight, so each process must have all of it."""
    return tuple(
        Rule(
            (switch, key),
            f"needs whole weights, and {key} gives each process a part of them",
            f"leave {key} out, or take an optimizer of optim",
            is_set("training", key),
        )
        for key in ("deepspeed", "fsdp")
    )


def requires_optim(switch: str, allowed: tuple[str, ...]) -> Rule:
    """The optimizer stands on one of these values of `optim`."""
    return Rule(
        ("optim", switch),
        f"does not go together with {switch}, which needs one of {', '.join(allowed)}",
        "leave optim out",
        lambda run: run.training["optim"] not in allowed,
    )


def whole_model(switch: str) -> Rule:
    """The optimizer saves memory for the weights of the model; an adapter has too few weights for that to matter."""
    return Rule(
        (switch, "finetuning_type"),
        "is for training the weights of the model itself, and an adapter has few of its own",
        "set finetuning_type: full or freeze, or leave the optimizer out",
        trains_adapter,
    )


def better_in_16_bits(switch: str) -> Rule:
    return warning(
        (switch, "pure_bf16"),
        "saves memory of the optimizer, and without pure_bf16 the weights in float32 take more than that",
        "set pure_bf16: true",
        not_(is_set("finetuning", "pure_bf16")),
    )


def one_process(key: str, reason: str, applies: Condition) -> Rule:
    """`reason` says why several processes cannot share the work, where the rule applies."""
    return Rule(
        (key,),
        reason,
        "train on one device (NPROC_PER_NODE=1), or leave it out",
        lambda run: int(os.environ.get("WORLD_SIZE", "1")) > 1 and applies(run),
    )


def names_targets(name: str, key: str) -> Rule:
    """The key of the optimizer `name` that says whose gradients are projected must say so."""
    return Rule(
        (key,),
        "names no module, so nothing would be projected",
        f"write {key}: all, or names such as q_proj,v_proj",
        not_(is_set(f"optimizers.{name}", key)),
    )


def layerwise(name: str, key: str) -> tuple[Rule, ...]:
    """What a run must not be if `key` makes the optimizer `name` step while gradients are still being computed."""
    is_on = is_set(f"optimizers.{name}", key)
    steps_early = When(is_on)
    return (
        steps_early.refuses(
            (key, "gradient_accumulation_steps"),
            "applies each gradient as soon as it is computed, so gradients of several batches cannot be accumulated",
            "set gradient_accumulation_steps: 1, or leave it out",
            is_other_than("training", "gradient_accumulation_steps", 1),
        ),
        steps_early.refuses(
            (key, "fp16"),
            "applies gradients before the loss scaling of float16 is undone",
            "use bf16 or pure_bf16",
            is_set("training", "fp16"),
        ),
        applies_update_early(key, is_on),
        one_process(key, "applies each gradient before the processes have exchanged it", is_on),
        steps_early.warns(
            ("max_grad_norm", key),
            f"has no effect: with {key} no two gradients exist at the same time, so they have no common norm",
            "leave it out",
            lambda run: run.training["max_grad_norm"] not in (0, DEFAULT_MAX_GRAD_NORM),
        ),
    )
