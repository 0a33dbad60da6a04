"""The keys of `luthier eval`."""

from dataclasses import dataclass
from typing import Literal

from luthier.config.keys.fields import no_effect

MetricName = Literal[
    "exact", "number", "f1", "accuracy", "precision", "recall", "class_f1", "json", "tool_call", "bleu", "rouge"
]
"""Metrics of generated answers; `luthier.evals.metrics` says what each compares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskConfig:
    """What tasks read, by themselves and while training."""

    task_dir: str = "evaluation"
    """Folder with the folders of multiple-choice questions, e.g. `evaluation/mmlu/`."""
    lang: Literal["en", "zh"] = "en"
    """Language of the words around a multiple-choice question."""
    n_shot: int = 5
    """Solved examples before each multiple-choice question. In tasks of lm-evaluation-harness, only if it is given."""
    metrics: tuple[MetricName, ...] = ("exact", "f1")
    """What the task `generation` measures of each answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalTasksConfig(TaskConfig):
    eval_tasks: tuple[str, ...] | None = None
    """Tasks of `luthier eval` to measure at each evaluation: `perplexity`, `generation`, or a folder of questions and
    its split (`mmlu_test`). They are logged as `eval_<task>_<metric>`, which `metric_for_best_model` may name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig(TaskConfig):
    task: tuple[str, ...] = ()
    """What is measured, one task or a list: a folder of multiple-choice questions and its split (`mmlu_test`),
    `perplexity`, `generation`, `pairwise`, or tasks of lm-evaluation-harness (`harness/arc_easy,piqa`)."""
    batch_size: int = 4
    """Questions that the model reads together."""
    seed: int = 42
    """Seed of the solved examples that are drawn, and of sampled answers."""
    save_dir: str | None = None
    """Folder for the results. It must be new, or hold unfinished results of the same command, which then goes on."""
    download_mode: str = no_effect("reuse_dataset_if_exists", "questions are read from task_dir, nothing is downloaded")
    """When questions are downloaded again."""
    compare: str | None = None
    """Compare question by question with `base`, the model without what was trained, or with the results in another
    `save_dir`."""
    html: str | None = None
    """File for the comparison as a web page."""
    judge_url: str | None = None
    """Address of the OpenAI-style API that judges for `task: pairwise`. The variable JUDGE_API_KEY holds its key."""
    judge_model: str | None = None
    """Name of the model that judges."""
