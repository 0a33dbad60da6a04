"""Rules about the datasets of a training run: which are read, how they are mixed, what is set aside."""

from typing import Any

from luthier.config.keys.data import are_probabilities, holds_tokenized_rows
from luthier.config.rules.engine import Rule, Rules, all_of, at_least, is_set, warning


def has_rows(run: Any) -> bool:
    """Whether there is anything to train on: a dataset, or tokenized rows."""
    return bool(run.data.dataset) or holds_tokenized_rows(run.data)


def _twice(key: str) -> Rule:
    def names_one_twice(run: Any) -> bool:
        names = getattr(run.data, key)
        return len(set(names)) < len(names)

    return warning(
        (key,),
        "names a dataset twice, so its rows count twice",
        'use "num_samples" in dataset_info.json to take more of one, or name it once',
        names_one_twice,
    )


def _shares_do_not_fit(run: Any) -> bool:
    count = len(run.data.interleave_probs)
    return any(names and count and len(names) != count for names in (run.data.dataset, run.data.eval_dataset))


def _are_no_shares(run: Any) -> bool:
    shares = run.data.interleave_probs
    return bool(shares) and not are_probabilities(shares)


def _never_exhausts(run: Any) -> bool:
    return 0 in run.data.interleave_probs and run.data.mix_strategy in ("interleave_over", "interleave_once")


DATA_RULES = Rules(
    (
        Rule(
            ("val_size", "dataset"),
            "there is no dataset to take rows from",
            "give a dataset, or leave val_size out",
            lambda run: run.data.val_size > 0 and not has_rows(run),
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
        _twice("dataset"),
        _twice("eval_dataset"),
        Rule(
            ("interleave_probs", "mix_strategy"),
            "datasets are concatenated, so there are no shares to sample them by",
            "set mix_strategy: interleave_under or interleave_over, or leave the shares out",
            all_of(is_set("data", "interleave_probs"), lambda run: run.data.mix_strategy == "concat"),
        ),
        Rule(
            ("interleave_probs", "dataset"),
            "there must be one share for each dataset",
            "give as many numbers as there are names in dataset (and in eval_dataset)",
            _shares_do_not_fit,
        ),
        Rule(
            ("interleave_probs",),
            "are not probabilities: none may be below 0, and together they must be 1",
            "write shares like 0.7,0.3",
            _are_no_shares,
        ),
        Rule(
            ("interleave_probs", "mix_strategy"),
            "a dataset of probability 0 is never used up, which interleave_over and interleave_once wait for",
            "leave that dataset out, or set mix_strategy: interleave_under",
            _never_exhausts,
        ),
        at_least("data", "max_samples", 1),
        at_least("data", "preprocessing_batch_size", 1),
    )
)
