"""Rules about `optim` and `lr_scheduler_type`: what each value of transformers needs before training can begin."""

from collections.abc import Mapping
from typing import Any

from luthier.config.rules.engine import (
    Condition,
    Rule,
    Rules,
    all_of,
    is_other_than,
    is_set,
    missing_library,
    not_,
    warning,
)
from luthier.core.versions import is_installed

_OF_BITSANDBYTES = (
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
_OF_GALORE = (
    *("galore_adamw", "galore_adamw_8bit", "galore_adafactor"),
    *("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
)
_OF_APOLLO = ("apollo_adamw", "apollo_adamw_layerwise")

LIBRARIES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "bitsandbytes": (_OF_BITSANDBYTES, "pip install bitsandbytes"),
    "galore_torch": (_OF_GALORE, "set use_galore: true, which needs no library, or pip install galore-torch"),
    "apollo_torch": (_OF_APOLLO, "set use_apollo: true, which needs no library, or pip install apollo-torch"),
    "torchao": (("adamw_torch_4bit", "adamw_torch_8bit"), "pip install torchao"),
    "lomo_optim": (("lomo", "adalomo"), "pip install lomo-optim"),
    "grokadamw": (("grokadamw",), "pip install grokadamw"),
    "schedulefree": (
        ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
        "pip install schedulefree",
    ),
    "optimi": (("stable_adamw",), "pip install torch-optimi"),
    "torch_xla": (("adamw_torch_xla",), "use adamw_torch, unless the run takes place on a TPU"),
    "torch_npu": (("adamw_torch_npu_fused",), "use adamw_torch, unless the run takes place on an Ascend NPU"),
    "torchdistx": (("adamw_anyprecision",), "use adamw_torch; with pure_bf16 its state is in 16 bits too"),
}
"""Module -> the values of `optim` that transformers builds from it, and what to do if it is missing."""

NEEDS_ACCELERATOR = ("adalomo", "galore_adamw_8bit", "galore_adamw_8bit_layerwise")
"""Values of `optim` whose library has no code for a CPU."""

_UPDATES_IN_BACKWARD = (
    "lomo",
    "adalomo",
    *(name for name in (*_OF_GALORE, *_OF_APOLLO) if name.endswith("_layerwise")),
)
_WATCHES = ("reduce_lr_on_plateau", "greedy")
"""Schedules that go by the metric of an evaluation."""
WITHOUT_WARM_UP = ("constant", *_WATCHES)
_HAS_MINIMUM = ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
_OF_PLATEAU = ("mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps")

SETTINGS: Mapping[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "reduce_lr_on_plateau": _OF_PLATEAU,
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        *("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    ),
    "greedy": (*_OF_PLATEAU, "warmup", "max_lr", "verbose", "smooth", "window_size", "reset_start"),
}
"""Value of `lr_scheduler_type` -> what `lr_scheduler_kwargs` may set for it."""
_READS_NO_SETTINGS = ("constant", "constant_with_warmup")
"""Schedules that transformers builds without looking at `lr_scheduler_kwargs`."""


def _names_no_minimum(run: Any) -> bool:
    kwargs = run.training["lr_scheduler_kwargs"] or {}
    return isinstance(kwargs, Mapping) and not {"min_lr", "min_lr_rate"} & kwargs.keys()


def _has_other_settings(schedule: str) -> Condition:
    def broken(run: Any) -> bool:
        kwargs = run.training["lr_scheduler_kwargs"]
        taken = run.training["lr_scheduler_type"] == schedule and isinstance(kwargs, Mapping)
        return taken and not kwargs.keys() <= set(SETTINGS[schedule])

    return broken


def _takes_settings(schedule: str) -> Rule:
    keys, settings = ("lr_scheduler_kwargs", "lr_scheduler_type"), ", ".join(SETTINGS[schedule])
    if schedule in _READS_NO_SETTINGS:
        reason = f"is not read by lr_scheduler_type: {schedule}"
        return warning(keys, reason, "leave it out, or take another schedule", _has_other_settings(schedule))
    reason = f"does not fit lr_scheduler_type: {schedule}, which has {settings or 'no settings'}"
    return Rule(keys, reason, "leave the others out, or take another schedule", _has_other_settings(schedule))


def _optim_is_in(values: tuple[str, ...]) -> Condition:
    return lambda run: run.training["optim"] in values


def _needs_library(module: str, values: tuple[str, ...], remedy: str) -> Rule:
    return missing_library(
        "optim",
        module,
        remedy,
        all_of(_optim_is_in(values), lambda run: run.trains, lambda run: not is_installed(module)),
    )


def _has_no_warm_up(key: str) -> Rule:
    return warning(
        (key, "lr_scheduler_type"),
        "has no effect: this schedule has no warm-up",
        "use constant_with_warmup, or another schedule that warms up",
        lambda run: run.training["lr_scheduler_type"] in WITHOUT_WARM_UP and run.training[key] > 0,
    )


_is_low_rank = _optim_is_in((*_OF_GALORE, *_OF_APOLLO))

OPTIM_RULES = Rules(
    (
        *(_needs_library(module, values, remedy) for module, (values, remedy) in LIBRARIES.items()),
        Rule(
            ("optim",),
            "cannot be built by this version of transformers",
            "set use_galore: true, galore_layerwise: true and optim: adafactor",
            _optim_is_in(("galore_adafactor_layerwise",)),
        ),
        Rule(
            ("optim", "optim_target_modules"),
            "needs the names of the modules whose gradients are projected",
            "set optim_target_modules: all-linear",
            all_of(_is_low_rank, not_(is_set("training", "optim_target_modules"))),
        ),
        warning(
            ("optim_target_modules", "optim"),
            "is read by the galore and apollo values of optim only",
            "leave it out",
            all_of(is_set("training", "optim_target_modules"), not_(_is_low_rank)),
        ),
        Rule(
            ("optim", "gradient_accumulation_steps"),
            "applies each gradient as soon as it is computed, so gradients of several batches cannot be accumulated",
            "set gradient_accumulation_steps: 1, or take another optim",
            all_of(_optim_is_in(_UPDATES_IN_BACKWARD), is_other_than("training", "gradient_accumulation_steps", 1)),
        ),
        Rule(
            ("lr_scheduler_type", "eval_strategy"),
            "goes by the metric of evaluations, and there are none while training",
            "set eval_strategy: steps or epoch",
            lambda run: run.training["lr_scheduler_type"] in _WATCHES and run.training["eval_strategy"] == "no",
        ),
        Rule(
            ("lr_scheduler_type", "lr_scheduler_kwargs"),
            "needs the smallest learning rate",
            "set lr_scheduler_kwargs: {min_lr: 1.0e-6}, or {min_lr_rate: 0.1} for a share",
            lambda run: run.training["lr_scheduler_type"] in _HAS_MINIMUM and _names_no_minimum(run),
        ),
        *(_takes_settings(schedule) for schedule in SETTINGS),
        _has_no_warm_up("warmup_steps"),
        _has_no_warm_up("warmup_ratio"),
    )
)
