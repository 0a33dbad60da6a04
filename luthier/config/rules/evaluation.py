"""Rules about evaluation in a training run, and about what depends on it: the best model, early stopping."""

from typing import Any

from luthier.config.keys.data import holds_tokenized_rows
from luthier.config.rules.engine import Rule, Rules, above, all_of, at_least, is_given, is_other_than, is_set, not_
from luthier.config.rules.eval_command import kind_of
from luthier.core.kinds import EVAL_KINDS, STAGES

OF_ANSWERS = ("bleu-4", "rouge-1", "rouge-2", "rouge-l")
EVAL_METRICS = ("loss", "accuracy", *OF_ANSWERS)
"""What an evaluation can measure. With several evaluation sets the name of a set stands before the metric."""


def _has_eval_rows(run: Any) -> bool:
    return bool(run.data.eval_dataset) or run.data.val_size > 0 or holds_tokenized_rows(run.data)


evaluates_while_training = is_other_than("training", "eval_strategy", "no")


def _without_rows(key: str, evaluates: Any) -> Rule:
    return Rule(
        (key, "eval_dataset", "val_size"),
        "there are no rows to evaluate on",
        "give eval_dataset, or val_size above 0",
        all_of(evaluates, not_(_has_eval_rows)),
    )


def _saves_what_it_evaluates(run: Any) -> bool:
    evaluates, saves = run.training["eval_strategy"], run.training["save_strategy"]
    return evaluates != "no" and saves in (evaluates, "best")


def _saves_the_best_only(run: Any) -> bool:
    return bool(run.trains and run.training["save_strategy"] == "best")


def _saves_between_evaluations(run: Any) -> bool:
    """As transformers refuses it when its arguments are built. Steps below 1 are a share of all steps."""
    keys = run.training
    evaluates, saves = keys["eval_steps"] or keys["logging_steps"], keys["save_steps"]
    if not keys["load_best_model_at_end"] or (keys["eval_strategy"], keys["save_strategy"]) != ("steps", "steps"):
        return False
    if evaluates <= 0 or saves <= 0 or saves % evaluates == 0:
        return False  # numbers of 0 and below break rules of their own
    both_are_shares = evaluates < 1 and saves < 1
    return not both_are_shares or (saves * 1_000_000) % (evaluates * 1_000_000) != 0


def _does_not_name_the_set(run: Any) -> bool:
    """The best of several evaluations is needed, and the metric does not say of which dataset."""
    needs_best = run.training["load_best_model_at_end"] or run.training["save_strategy"] == "best"
    metric = (run.training["metric_for_best_model"] or "loss").removeprefix("eval_")
    return (
        run.data.eval_on_each_dataset
        and bool(run.data.eval_dataset)
        and (needs_best or run.finetuning.early_stopping_steps is not None)
        and not metric.startswith(tuple(f"{name}_" for name in run.data.eval_dataset))
    )


def _names_none(run: Any) -> bool:
    """Whether `eval_tasks` has a name of no task, or of one that does not run while training."""
    kinds = map(kind_of, run.tasks.eval_tasks or ())
    return any(kind is None or not EVAL_KINDS.get(kind).in_training for kind in kinds)


def _lacks_rows_of_tasks(run: Any) -> bool:
    tasks, stage = run.tasks.eval_tasks or (), STAGES.get(run.stage)
    lacks_texts = "perplexity" in tasks and stage.reads != "cross_entropy"
    return lacks_texts or ("generation" in tasks and stage.rows.name != "dialogues")


def _is_unknown_metric(run: Any) -> bool:
    metric = (run.training["metric_for_best_model"] or "loss").removeprefix("eval_")
    of_tasks = tuple(f"{task}_" for task in run.tasks.eval_tasks or ())
    own = STAGES.get(run.stage).reporting.evaluated(run.method)
    return not metric.endswith((*EVAL_METRICS, *own)) and not metric.startswith(of_tasks)


def _is_not_measured(run: Any) -> bool:
    """Whether the evaluations of this run give another metric only, although there is such a metric."""
    metric = (run.training["metric_for_best_model"] or "loss").removeprefix("eval_")
    of_tasks = tuple(f"{task}_" for task in run.tasks.eval_tasks or ())
    answers = OF_ANSWERS if run.training["predict_with_generate"] else ()
    measured = ("loss", *answers, *STAGES.get(run.stage).reporting.evaluated(run.method))
    is_there = metric.endswith(measured) or metric.startswith(of_tasks)
    return run.trains and evaluates_while_training(run) and not is_there and not _is_unknown_metric(run)


def _prefers_a_high_perplexity(run: Any) -> bool:
    metric = run.training["metric_for_best_model"] or ""
    return metric.endswith("perplexity") and run.training["greater_is_better"] is not False


EVALUATION_RULES = Rules(
    (
        *(_without_rows(key, is_set("training", key)) for key in ("do_eval", "do_predict", "predict_with_generate")),
        _without_rows("eval_strategy", evaluates_while_training),
        Rule(
            ("load_best_model_at_end", "eval_strategy", "save_strategy"),
            "the best model is known only if it is evaluated whenever it is saved",
            "give eval_strategy and save_strategy the same value",
            all_of(is_set("training", "load_best_model_at_end"), not_(_saves_what_it_evaluates)),
        ),
        Rule(
            ("save_steps", "eval_steps", "load_best_model_at_end"),
            "the best model is known only if it is evaluated whenever it is saved",
            "make save_steps a multiple of eval_steps (both numbers of steps, or both shares below 1)",
            _saves_between_evaluations,
        ),
        Rule(
            ("save_strategy", "eval_strategy"),
            "best saves after an evaluation, and there are none while training, so nothing would be saved",
            "set eval_strategy: steps or epoch, or save_strategy: steps or epoch",
            all_of(_saves_the_best_only, not_(evaluates_while_training)),
        ),
        Rule(
            ("early_stopping_steps", "eval_strategy"),
            "counts evaluations, and there are none while training",
            "set eval_strategy: steps or epoch",
            all_of(is_given("finetuning", "early_stopping_steps"), not_(evaluates_while_training)),
        ),
        at_least("finetuning", "early_stopping_steps", 1),
        Rule(
            ("metric_for_best_model", "compute_accuracy", "predict_with_generate", "stage"),
            "no evaluation of this version gives this metric",
            f"use one that ends in {', '.join(EVAL_METRICS)}",
            _is_unknown_metric,
        ),
        Rule(
            ("metric_for_best_model", "compute_accuracy", "predict_with_generate", "stage"),
            "is not measured by the evaluations of this run",
            "set compute_accuracy: true for accuracy, predict_with_generate: true for bleu-4 and rouge (both of stage:"
            " sft), or name loss",
            _is_not_measured,
        ),
        Rule(
            ("eval_tasks",),
            "names something that is not measured while training",
            "name perplexity, generation, or <folder>_<split> such as mmlu_test",
            _names_none,
        ),
        Rule(
            ("eval_tasks", "eval_strategy", "do_eval"),
            "are measured at each evaluation, and there is none",
            "set eval_strategy: steps or epoch, or do_eval: true",
            all_of(is_set("tasks", "eval_tasks"), not_(evaluates_while_training), not_(is_set("training", "do_eval"))),
        ),
        Rule(
            ("eval_tasks", "stage"),
            "are questions to a language model, and this stage trains another kind of model",
            "leave it out",
            all_of(is_set("tasks", "eval_tasks"), lambda run: STAGES.get(run.stage).head != "language_model"),
        ),
        Rule(
            ("eval_tasks", "stage"),
            "has a task that needs rows with one text or one answer each, which this stage does not have",
            "name a folder of questions, such as mmlu_test",
            _lacks_rows_of_tasks,
        ),
        Rule(
            ("eval_tasks", "fsdp", "deepspeed"),
            "need whole weights on each device, and these are sharded",
            "leave it out, and run `luthier eval` on a checkpoint",
            all_of(
                is_set("tasks", "eval_tasks"),
                lambda run: bool(run.training["fsdp"] or run.training["deepspeed"]),
            ),
        ),
        Rule(
            ("greater_is_better", "metric_for_best_model"),
            "a lower perplexity is better",
            "set greater_is_better: false",
            _prefers_a_high_perplexity,
        ),
        Rule(
            ("metric_for_best_model", "eval_on_each_dataset"),
            "each evaluation set has a loss of its own, and the metric must name one of them",
            "name the set too: metric_for_best_model: eval_<name of the set>_loss",
            _does_not_name_the_set,
        ),
        above("training", "eval_steps", 0, if_training=("eval_strategy", "steps"), remedy="or eval_strategy: no"),
    )
)
