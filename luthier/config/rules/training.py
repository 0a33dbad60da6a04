"""Rules about the numbers of a training run: steps, batch sizes, learning rate, number types."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from luthier.config.keys.training import BY_LENGTH
from luthier.config.rules.engine import (
    Condition,
    Rule,
    Rules,
    above,
    all_of,
    at_least,
    at_most,
    is_set,
    not_,
    warning,
    within,
)
from luthier.core.kinds import STAGES
from luthier.core.machine import num_cpus


def _smooths_labels(run: Any) -> bool:
    return "label_smoothing_factor" in asdict(run.method)


def _is_a_broken_number_of_steps(key: str, strategy: str) -> Condition:
    def is_broken(run: Any) -> bool:
        steps = run.training[key]
        return run.training[strategy] == "steps" and steps is not None and _is_no_number_of_steps(steps)

    return is_broken


def _evaluates_at_no_step(run: Any) -> bool:
    """Without eval_steps transformers takes logging_steps, whatever logging_strategy says."""
    keys = run.training
    steps = keys["logging_steps"]
    falls_back = keys["eval_strategy"] == "steps" and keys["eval_steps"] is None
    return falls_back and (steps <= 0 or _is_no_number_of_steps(steps))


def _is_no_number_of_steps(steps: float) -> bool:
    """Below 1 it is a share of all steps."""
    return steps > 1 and steps % 1 != 0


MOST = 1_000_000_000
"""Epochs, steps, and rows of a batch. More cannot be computed in any time, and libraries cannot count them."""
DEBUG_OPTIONS = ("underflow_overflow", "tpu_metrics_debug")
"""What transformers takes for `debug`, one or both of them."""
ACCELERATOR_KEYS = (
    "split_batches",
    "dispatch_batches",
    "even_batches",
    "use_seedable_sampler",
    "non_blocking",
    "gradient_accumulation_kwargs",
    "use_configured_state",
)
"""What transformers takes in `accelerator_config`."""


COMPILERS = (
    *("inductor", "eager", "aot_eager", "cudagraphs", "tvm", "onnxrt", "tensorrt", "fx2trt", "ofi", "ipex"),
    *("aot_ts_nvfuser", "nvprims_nvfuser", "torchxla_trace_once", "aot_torchxla_trace_once", "hpu_backend", "neuron"),
)
"""What releases of accelerate take for `torch_compile_backend`."""
COMPILER_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "lite")
"""What torch.compile takes for `torch_compile_mode`."""


def _is_none_of(key: str, names: tuple[str, ...]) -> Condition:
    return lambda run: run.training[key] is not None and run.training[key].lower() not in names


def _debugs_the_unknown(run: Any) -> bool:
    asked = run.training["debug"] or ()
    return not set(asked.split() if isinstance(asked, str) else asked) <= set(DEBUG_OPTIONS)


def _configures_the_unknown(run: Any) -> bool:
    asked = run.training["accelerator_config"]
    return isinstance(asked, Mapping) and not asked.keys() <= set(ACCELERATOR_KEYS)


def _sorts_by_length(run: Any) -> bool:
    return run.training["train_sampling_strategy"] in BY_LENGTH


def _samples_answers(run: Any) -> bool:
    return run.trains and STAGES.get(run.stage).rollout(run.method) is not None


TRAINING_RULES = Rules(
    (
        Rule(
            ("torch_compile_backend",),
            "no compiler has this name",
            f"name one such as {', '.join(COMPILERS[:4])}, or leave it out",
            _is_none_of("torch_compile_backend", COMPILERS),
        ),
        Rule(
            ("torch_compile_mode",),
            "torch.compile has no such mode",
            f"name one of {', '.join(COMPILER_MODES)}, or leave it out",
            _is_none_of("torch_compile_mode", COMPILER_MODES),
        ),
        Rule(
            ("train_sampling_strategy", "stage"),
            "orders rows by their lengths, and here the answers that the model samples are trained on, whose lengths"
            " are not known before",
            "leave it out",
            all_of(_sorts_by_length, _samples_answers),
        ),
        Rule(
            ("train_sampling_strategy", "disable_shuffling"),
            "orders rows by their lengths, and disable_shuffling keeps the order of the dataset",
            "set one of the two",
            all_of(_sorts_by_length, is_set("finetuning", "disable_shuffling")),
        ),
        *(
            Rule(
                ("cache_media_features", key),
                "keeps features of images that change as soon as what makes them learns",
                f"leave it out, or set {key}: true",
                all_of(is_set("finetuning", "cache_media_features"), not_(is_set("finetuning", key))),
            )
            for key in ("freeze_vision_tower", "freeze_multi_modal_projector")
        ),
        Rule(
            ("cache_media_features", "streaming"),
            "computes the features of all rows before training, and nobody knows how many rows a stream has",
            "leave it out, or streaming",
            all_of(is_set("finetuning", "cache_media_features"), is_set("data", "streaming")),
        ),
        Rule(
            ("fp16", "bf16"),
            "a run has one number type",
            "set one of the two",
            all_of(is_set("training", "fp16"), is_set("training", "bf16")),
        ),
        Rule(
            ("pure_bf16", "fp16"),
            "a run has one number type",
            "set one of the two",
            all_of(is_set("finetuning", "pure_bf16"), is_set("training", "fp16")),
        ),
        warning(
            ("warmup_ratio", "warmup_steps"),
            "is not read, since warmup_steps takes precedence",
            "give one of the two",
            lambda run: run.training["warmup_ratio"] > 0 and run.training["warmup_steps"] > 0,
        ),
        warning(
            ("label_smoothing_factor", "stage"),
            "is not read here, only by stage: pt or stage: sft",
            "leave it out",
            lambda run: run.training["label_smoothing_factor"] > 0 and not _smooths_labels(run),
        ),
        within("training", "per_device_train_batch_size", 1, MOST, or_high=True),
        within("training", "per_device_eval_batch_size", 1, MOST, or_high=True),
        at_least("training", "gradient_accumulation_steps", 1),
        at_most("training", "num_train_epochs", MOST),
        at_most("training", "max_steps", MOST),
        Rule(
            ("max_steps", "num_train_epochs"),
            "leaves nothing to train",
            "give a number above 0, or -1 to go by num_train_epochs",
            lambda run: run.training["max_steps"] < 1 and run.training["max_steps"] != -1,
        ),
        Rule(
            ("num_train_epochs", "max_steps"),
            "leaves nothing to train",
            "give a number above 0",
            lambda run: run.training["max_steps"] == -1 and run.training["num_train_epochs"] <= 0,
        ),
        above(
            "training", "logging_steps", 0, if_training=("logging_strategy", "steps"), remedy="or logging_strategy: no"
        ),
        above("training", "save_steps", 0, if_training=("save_strategy", "steps"), remedy="or save_strategy: no"),
        *(
            Rule(
                (key, strategy),
                "must be a whole number of steps, or a share of them below 1",
                "",
                _is_a_broken_number_of_steps(key, strategy),
            )
            for key, strategy in (
                ("logging_steps", "logging_strategy"),
                ("save_steps", "save_strategy"),
                ("eval_steps", "eval_strategy"),
            )
        ),
        Rule(
            ("logging_steps", "eval_steps", "eval_strategy"),
            "takes the place of eval_steps, so it must be a whole number of steps, or a share of them below 1",
            "set eval_steps",
            _evaluates_at_no_step,
        ),
        Rule(
            ("debug",), "is nothing that transformers can debug", f"{' or '.join(DEBUG_OPTIONS)}", _debugs_the_unknown
        ),
        Rule(
            ("accelerator_config",),
            "has keys that transformers does not know",
            f"it takes {', '.join(ACCELERATOR_KEYS)}",
            _configures_the_unknown,
        ),
        at_least("training", "torch_empty_cache_steps", 1),
        Rule(
            ("dataloader_prefetch_factor", "dataloader_num_workers"),
            "is for processes that prepare batches, and there are none",
            "set dataloader_num_workers: 1 or more, or leave it out",
            lambda run: (
                run.training["dataloader_prefetch_factor"] is not None and run.training["dataloader_num_workers"] == 0
            ),
        ),
        within("training", "seed", 0, 2**32 - 1, or_high=True),
        within("training", "data_seed", 0, 2**32 - 1, or_high=True),
        at_least("training", "learning_rate", 0),
        at_least("training", "weight_decay", 0),
        at_least("training", "max_grad_norm", 0),
        within("training", "adam_beta1", 0, 1, or_high=False),
        within("training", "adam_beta2", 0, 1, or_high=False),
        at_least("training", "adam_epsilon", 0),
        at_least("training", "neftune_noise_alpha", 0),
        at_least("training", "dataloader_num_workers", 0),
        Rule(
            ("dataloader_num_workers",),
            "starts more than 64 processes and more than 8 for each CPU of this machine, which wait for each other",
            "a few for each process of the run are enough",
            lambda run: run.training["dataloader_num_workers"] > max(64, 8 * num_cpus()),
        ),
        at_least("training", "warmup_steps", 0),
        within("training", "warmup_ratio", 0, 1, or_high=False),
    )
)
