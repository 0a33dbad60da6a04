"""Rules between keys, as values: what must not be, why, and what to do. Those of a variant stand in the variant's file.

`Rules` is also the type of the `check` of a stage or an adapter, so `luthier explain` can show what a key excludes.
"""

import os
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from luthier.config.keys.data import holds_tokenized_rows
from luthier.config.rules.engine import Rule, Rules, above, at_least, within
from luthier.config.sections import is_on
from luthier.core.errors import Problem
from luthier.core.kinds import ADAPTERS, TOOL_SYNTAXES
from luthier.core.versions import is_installed


def _has_eval_data(run: Any) -> bool:
    return bool(run.data.eval_dataset) or run.data.val_size > 0 or holds_tokenized_rows(run.data)


def _smooths_labels(run: Any) -> bool:
    return "label_smoothing_factor" in asdict(run.method)


def _does_nothing(run: Any) -> bool:
    return not run.data.dataset and not any(run.training[key] for key in ("do_train", "do_eval", "do_predict"))


def _leaves_the_set_open(run: Any) -> bool:
    """The best model is asked for, among several evaluations, and not by which of them."""
    asked = run.training["load_best_model_at_end"] or run.training["save_strategy"] == "best"
    metric = (run.training["metric_for_best_model"] or "loss").removeprefix("eval_")
    return (
        run.data.eval_on_each_dataset
        and bool(run.data.eval_dataset)
        and (asked or run.finetuning.early_stopping_steps is not None)
        and not metric.startswith(tuple(f"{name}_" for name in run.data.eval_dataset))
    )


def _under_launcher() -> bool:
    return "LOCAL_RANK" in os.environ or is_on(os.environ, "FORCE_TORCHRUN")


EVAL_METRICS = ("loss", "accuracy", "bleu-4", "rouge-1", "rouge-2", "rouge-l")
"""What an evaluation may be judged by; the names of several evaluation sets may stand before them."""
_EVAL_REMEDY = "give eval_dataset, or val_size above 0"

MODEL_RULES = Rules(
    (
        Rule(
            ("adapter_name_or_path", "finetuning_type"),
            "adapters are loaded by finetuning_type: lora or oft only",
            "set the one that the adapter was trained with, or leave the adapters out",
            lambda run: bool(run.model.adapter_name_or_path) and not ADAPTERS.get(run.finetuning_type).adds_weights,
        ),
        Rule(
            ("model_name_or_path",),
            "is empty",
            "name a folder, a .gguf file or a model of the hub",
            lambda run: not run.model.model_name_or_path,
        ),
        at_least("data", "cutoff_len", 1),
    )
)
"""For every command."""

GENERATING_RULES = Rules(
    (
        at_least("generating", "temperature", 0),
        within("generating", "top_p", 0, 1, or_high=True),
        at_least("generating", "top_k", 0),
        at_least("generating", "num_beams", 1),
        Rule(
            ("max_new_tokens", "max_length"),
            "leaves no room for an answer, together with max_length",
            "set one of them above 0",
            lambda run: run.generating.max_new_tokens <= 0 and run.generating.max_length <= 0,
        ),
        Rule(
            ("tool_format",),
            "no tool syntax has this name",
            "leave it out to take that of the template",
            lambda run: run.data.tool_format is not None and run.data.tool_format not in TOOL_SYNTAXES.names,
        ),
    )
)
"""For the commands that render conversations."""

OUTPUT_RULES = Rules(
    (
        Rule(
            ("output_dir",),
            "is missing",
            "say which folder to write to, e.g. output_dir: saves/first",
            lambda run: not run.training["output_dir"] and not _does_nothing(run),
        ),
    )
)
"""For training itself; `luthier data` writes no model."""

TRAIN_RULES = Rules(
    (
        Rule(
            ("dataset", "do_train", "do_eval", "do_predict"),
            "there is nothing to do: neither a dataset nor one of do_train, do_eval, do_predict",
            "give a dataset",
            _does_nothing,
        ),
        Rule(
            ("dataset", "do_train"),
            "is missing, and do_train needs one",
            "give names from dataset_info.json",
            lambda run: run.training["do_train"] and not run.data.dataset and not holds_tokenized_rows(run.data),
        ),
        Rule(
            ("do_train", "do_eval", "do_predict"),
            "not given, and neither are do_eval and do_predict: this run trains",
            "write do_train: true",
            lambda run: bool(run.data.dataset) and run.trains and not run.training["do_train"],
            only_warns=True,
        ),
        Rule(
            ("val_size", "dataset"),
            "there is no dataset to take rows from",
            "give a dataset, or leave val_size out",
            lambda run: run.data.val_size > 0 and not run.data.dataset and not holds_tokenized_rows(run.data),
        ),
        Rule(
            ("val_size", "eval_dataset"),
            "rows are set aside for evaluation only if there is no eval_dataset",
            "give one of the two",
            lambda run: run.data.val_size > 0 and bool(run.data.eval_dataset),
        ),
        at_least("data", "val_size", 0),
        Rule(
            ("val_size",),
            "is a number of rows if it is 1 or more, so it must be whole",
            "write a whole number, or a share below 1",
            lambda run: run.data.val_size > 1 and run.data.val_size % 1 != 0,
        ),
        *(
            Rule(
                (key,),
                "names a dataset twice, so its rows count twice",
                'use "num_samples" in dataset_info.json to take more of one, or name it once',
                lambda run, key=key: len(set(names := getattr(run.data, key))) < len(names),  # type: ignore[misc]
                only_warns=True,
            )
            for key in ("dataset", "eval_dataset")
        ),
        *(
            Rule(
                (key, "eval_dataset", "val_size"),
                "there are no rows to evaluate on",
                _EVAL_REMEDY,
                lambda run, key=key: run.training[key] and not _has_eval_data(run),  # type: ignore[misc]
            )
            for key in ("do_eval", "do_predict", "predict_with_generate")
        ),
        Rule(
            ("eval_strategy", "eval_dataset", "val_size"),
            "there are no rows to evaluate on",
            _EVAL_REMEDY,
            lambda run: run.training["eval_strategy"] != "no" and not _has_eval_data(run),
        ),
        Rule(
            ("interleave_probs", "mix_strategy"),
            "datasets are put one after the other, so there is no share of each",
            "set mix_strategy: interleave_under or interleave_over, or leave the shares out",
            lambda run: bool(run.data.interleave_probs) and run.data.mix_strategy == "concat",
        ),
        Rule(
            ("interleave_probs", "dataset"),
            "there must be one share for each dataset",
            "give as many numbers as there are names in dataset (and in eval_dataset)",
            lambda run: any(
                names and run.data.interleave_probs and len(names) != len(run.data.interleave_probs)
                for names in (run.data.dataset, run.data.eval_dataset)
            ),
        ),
        Rule(
            ("fp16", "bf16"), "a run has one number type", "set one of the two", lambda run: _both(run, "fp16", "bf16")
        ),
        Rule(
            ("pure_bf16", "fp16"),
            "a run has one number type",
            "set one of the two",
            lambda run: run.finetuning.pure_bf16 and run.training["fp16"],
        ),
        Rule(
            ("warmup_ratio", "warmup_steps"),
            "is not read, since warmup_steps goes before it",
            "give one of the two",
            lambda run: run.training["warmup_ratio"] > 0 and run.training["warmup_steps"] > 0,
            only_warns=True,
        ),
        Rule(
            ("load_best_model_at_end", "eval_strategy", "save_strategy"),
            "the best model is known only if it is evaluated whenever it is saved",
            "give eval_strategy and save_strategy the same value",
            lambda run: run.training["load_best_model_at_end"] and not _saves_what_it_evaluates(run),
        ),
        Rule(
            ("early_stopping_steps", "eval_strategy"),
            "counts evaluations, and there are none while training",
            "set eval_strategy: steps or epoch",
            lambda run: run.finetuning.early_stopping_steps is not None and run.training["eval_strategy"] == "no",
        ),
        at_least("finetuning", "early_stopping_steps", 1),
        Rule(
            ("metric_for_best_model", "compute_accuracy", "predict_with_generate"),
            "no evaluation of this version gives this metric",
            f"use one that ends in {', '.join(EVAL_METRICS)}",
            lambda run: not (run.training["metric_for_best_model"] or "loss").endswith(EVAL_METRICS),
        ),
        Rule(
            ("metric_for_best_model", "eval_on_each_dataset"),
            "each evaluation set has a loss of its own, so it must be said which one tells the best model",
            "name the set too: metric_for_best_model: eval_<name of the set>_loss",
            _leaves_the_set_open,
        ),
        Rule(
            ("deepspeed",),
            "the library deepspeed is not installed here",
            "pip install 'luthier[deepspeed]' where the run takes place",
            lambda run: run.training["deepspeed"] is not None and not is_installed("deepspeed"),
            only_warns=True,
        ),
        *(
            Rule(
                (key,),
                "needs a run that torchrun has started",
                "set the environment variable FORCE_TORCHRUN=1",
                lambda run, key=key: run.training[key] and not _under_launcher(),  # type: ignore[misc]
                only_warns=True,
            )
            for key in ("deepspeed", "fsdp")
        ),
        Rule(
            ("label_smoothing_factor", "stage"),
            "is not read here, only by stage: pt or stage: sft",
            "leave it out",
            lambda run: run.training["label_smoothing_factor"] > 0 and not _smooths_labels(run),
            only_warns=True,
        ),
        at_least("data", "max_samples", 1),
        at_least("data", "preprocessing_batch_size", 1),
        at_least("training", "per_device_train_batch_size", 1),
        at_least("training", "per_device_eval_batch_size", 1),
        at_least("training", "gradient_accumulation_steps", 1),
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
        above("training", "eval_steps", 0, if_training=("eval_strategy", "steps"), remedy="or eval_strategy: no"),
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
        at_least("training", "warmup_steps", 0),
        within("training", "warmup_ratio", 0, 1, or_high=False),
    )
)


def _both(run: Any, first: str, second: str) -> bool:
    return run.training[first] and run.training[second]


def _saves_what_it_evaluates(run: Any) -> bool:
    evaluates, saves = run.training["eval_strategy"], run.training["save_strategy"]
    return evaluates != "no" and saves in (evaluates, "best")


LAUNCHERS = {
    "USE_V1": "there is one engine only",
    "USE_RAY": "Ray is not part of this version",
    "USE_MCA": "Megatron-core is not part of this version",
    "USE_MEGATRON_BRIDGE": "Megatron-Bridge is not part of this version",
}
"""Switches of the reference that live in the environment."""


def launcher_problems() -> Iterator[Problem]:
    """A training run that the environment asks to start in a way that this version does not have."""
    for name, reason in LAUNCHERS.items():
        if is_on(os.environ, name):
            remedy = f"unset {name}; several devices are used through torchrun"
            yield Problem(name, reason, remedy, file="environment")
