"""Rules about `luthier eval`: what is measured, and how many questions at once."""

from typing import Any

from luthier.config.rules.engine import Rule, Rules, all_of, at_least, is_given, is_other_than, not_, warning
from luthier.core.kinds import EVAL_KINDS, STAGES


def kind_of(task: str | None) -> str | None:
    """The name of the kind of task (a file in luthier/evals/tasks/) that measures `task`; None if there is none."""
    if task is None:
        return None
    return next((name for name in EVAL_KINDS.names if EVAL_KINDS.get(name).is_chosen(task)), None)


def _is_unknown(run: Any) -> bool:
    return kind_of(run.evaluation.task) is None


EVAL_RULES = Rules(
    (
        Rule(
            ("task",),
            "is missing",
            "say what to measure, e.g. task: mmlu_test or task: perplexity",
            not_(is_given("evaluation", "task")),
        ),
        Rule(
            ("task",),
            "nothing is measured under this name",
            "write perplexity, <folder>_<split> such as mmlu_test, or harness/<task>",
            all_of(is_given("evaluation", "task"), _is_unknown),
        ),
        Rule(
            ("stage",),
            "trains a model that scores texts and writes none",
            "name a language model, with stage: sft",
            lambda run: STAGES.get(run.stage).head != "language_model",
        ),
        at_least("evaluation", "batch_size", 1),
        at_least("evaluation", "n_shot", 0),
        warning(
            ("infer_backend",),
            "is not read here: transformers computes the log-probabilities",
            "leave it out",
            is_other_than("model", "infer_backend", "huggingface"),
        ),
    )
)
