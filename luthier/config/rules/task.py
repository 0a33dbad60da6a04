"""Rules about what a training run is to do - train, evaluate, predict - and where it writes."""

from typing import Any

from luthier.config.rules.data import has_rows
from luthier.config.rules.engine import Rule, Rules, all_of, is_set, not_, warning


def _is_told_not_to_train(run: Any) -> bool:
    return run.given.get("do_train") is False and run.trains and bool(run.data.dataset)


def _has_no_task(run: Any) -> bool:
    return not run.data.dataset and not any(run.training[key] for key in ("do_train", "do_eval", "do_predict"))


OUTPUT_RULES = Rules(
    (
        Rule(
            ("output_dir",),
            "is missing",
            "say which folder to write to, e.g. output_dir: saves/first",
            all_of(not_(is_set("training", "output_dir")), not_(_has_no_task)),
            for_rows=False,
        ),
    )
)

TASK_RULES = Rules(
    (
        Rule(
            ("dataset", "do_train", "do_eval", "do_predict"),
            "there is nothing to do: neither a dataset nor one of do_train, do_eval, do_predict",
            "give a dataset",
            _has_no_task,
        ),
        Rule(
            ("dataset", "do_train"),
            "is missing, and do_train needs one",
            "give names from dataset_info.json",
            all_of(is_set("training", "do_train"), not_(has_rows)),
        ),
        Rule(
            ("do_train", "do_eval", "do_predict"),
            "there is nothing to do: neither do_eval nor do_predict is set",
            "set one of the three",
            _is_told_not_to_train,
            for_rows=False,
        ),
        warning(
            ("do_train", "do_eval", "do_predict"),
            "not given, and neither are do_eval and do_predict: this run trains",
            "write do_train: true",
            lambda run: bool(run.data.dataset) and run.trains and "do_train" not in run.given,
        ),
    )
)
"""What the run is to do: train, evaluate, predict."""
