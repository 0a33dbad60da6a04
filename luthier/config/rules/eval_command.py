"""Rules about `luthier eval`: what is measured, and how many questions at once."""

from typing import Any

from luthier.config.keys.data import holds_tokenized_rows
from luthier.config.rules.engine import Rule, Rules, all_of, at_least, is_given, is_other_than, is_set, not_, warning
from luthier.core.kinds import EVAL_KINDS, STAGES


def kind_of(task: str) -> str | None:
    """The name of the kind of task (a file in luthier/evals/tasks/) that measures `task`; None if there is none."""
    return next((name for name in EVAL_KINDS.names if EVAL_KINDS.get(name).is_chosen(task)), None)


def tasks_of(run: Any) -> tuple[str, ...]:
    """The tasks of a run. Tasks of lm-evaluation-harness may be listed after one `harness/`, and stay together."""
    tasks: list[str] = []
    for name in run.evaluation.task:
        if tasks and tasks[-1].startswith("harness/") and "/" not in name and kind_of(name) is None:
            tasks[-1] += f",{name}"
        else:
            tasks.append(name)
    return tuple(tasks)


def kinds_of(run: Any) -> tuple[str, ...]:
    """The kinds of the tasks of a run, each once."""
    found = (kind_of(task) for task in tasks_of(run))
    return tuple(dict.fromkeys(kind for kind in found if kind is not None))


def _is_unknown(run: Any) -> bool:
    return any(kind_of(task) is None for task in tasks_of(run))


def _names_one_twice(run: Any) -> bool:
    return len(set(tasks_of(run))) < len(tasks_of(run))


def asks_learned_rows(run: Any) -> bool:
    """Whether the rows that are evaluated are those that the run has trained on."""
    reads_rows = any(EVAL_KINDS.get(kind).reads_rows for kind in kinds_of(run))
    held_out = run.data.eval_dataset or run.data.val_size or holds_tokenized_rows(run.data)
    return bool(reads_rows and run.given.get("do_train") and run.data.dataset and not held_out)


EVAL_RULES = Rules(
    (
        Rule(
            ("task",),
            "is missing",
            "say what to measure, e.g. task: mmlu_test or task: perplexity",
            not_(is_set("evaluation", "task")),
        ),
        Rule(
            ("task",),
            "nothing is measured under this name",
            "write perplexity, generation, pairwise, <folder>_<split> such as mmlu_test, or harness/<task>",
            _is_unknown,
        ),
        Rule(("task",), "names a task twice", "name each task once", _names_one_twice),
        Rule(
            ("html", "compare"),
            "is a page of a comparison, and nothing is compared",
            "set compare: base or compare: <save_dir of another model>",
            all_of(is_given("evaluation", "html"), not_(is_given("evaluation", "compare"))),
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
            ("dataset", "val_size", "eval_dataset", "do_train"),
            "the model was trained on these rows, so they do not tell how it answers new ones",
            "name other rows in eval_dataset, or train with val_size",
            asks_learned_rows,
        ),
        warning(
            ("infer_backend",),
            "is not read here: transformers computes the log-probabilities",
            "leave it out",
            is_other_than("model", "infer_backend", "huggingface"),
        ),
    )
)
