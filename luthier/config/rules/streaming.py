"""Rules about `streaming`: what needs to know all rows beforehand cannot be had with it."""

from typing import Any

from luthier.config.keys.data import DataConfig, holds_tokenized_rows
from luthier.config.rules.engine import Rule, Rules, at_least
from luthier.core.kinds import STAGES

_DEFAULT_BUFFER = DataConfig().buffer_size


def _scores_rows_first(run: Any) -> bool:
    return run.stage in STAGES.names and any(spec.is_cached for spec in STAGES.get(run.stage).frozen_models(run))


STREAMING_RULES = Rules(
    (
        Rule(
            ("streaming", "max_steps"),
            "nobody knows how many rows a stream has, so the number of steps must be given",
            "set max_steps",
            lambda run: run.data.streaming and run.training["max_steps"] < 1,
        ),
        Rule(
            ("max_samples", "streaming"),
            "is a number of rows of each dataset, while a stream is read as far as max_steps goes",
            "leave max_samples out, or streaming",
            lambda run: run.data.streaming and run.data.max_samples is not None,
        ),
        Rule(
            ("val_size", "streaming"),
            "is a share of all rows, and nobody knows how many rows a stream has",
            "write a whole number of rows",
            lambda run: run.data.streaming and 0 < run.data.val_size < 1,
        ),
        Rule(
            ("tokenized_path", "streaming"),
            "is to be written with all rows, which a stream never has together",
            "leave streaming out for the run that writes it, or leave tokenized_path out",
            lambda run: (
                run.data.streaming and run.data.tokenized_path is not None and not holds_tokenized_rows(run.data)
            ),
        ),
        Rule(
            ("streaming", "tokenized_path"),
            "is not read, since the rows in tokenized_path are there already and stay on the disk",
            "leave it out",
            lambda run: run.data.streaming and holds_tokenized_rows(run.data),
            only_warns=True,
        ),
        Rule(
            ("streaming", "stage"),
            "what the reference model says of the rows is computed before training, which needs all of them",
            "leave streaming out, or use a loss without a reference, e.g. pref_loss: orpo or simpo",
            lambda run: run.data.streaming and _scores_rows_first(run),
        ),
        Rule(
            ("train_sampling_strategy", "streaming"),
            "is not followed, since rows of a stream are taken as they come",
            "leave it out",
            lambda run: run.data.streaming and run.training["train_sampling_strategy"] not in ("random", "sequential"),
            only_warns=True,
        ),
        Rule(
            ("buffer_size", "streaming"),
            "is not read here, only by streaming: true",
            "leave it out",
            lambda run: not run.data.streaming and run.data.buffer_size != _DEFAULT_BUFFER,
            only_warns=True,
        ),
        at_least("data", "buffer_size", 1),
    )
)
