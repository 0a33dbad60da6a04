"""Rules about `streaming`: what needs all rows beforehand does not work with it."""

from typing import Any

from luthier.config.keys.data import holds_tokenized_rows
from luthier.config.rules.engine import Rules, When, all_of, at_least, is_changed, is_given, is_set, not_, warning
from luthier.core.kinds import STAGES

_streams = is_set("data", "streaming")
_with_stream = When(_streams)


def _has_tokenized_rows(run: Any) -> bool:
    return holds_tokenized_rows(run.data)


def _scores_rows_first(run: Any) -> bool:
    """Whether a frozen model scores all rows before training."""
    return any(spec.is_cached for spec in STAGES.get(run.stage).frozen_models(run))


STREAMING_RULES = Rules(
    (
        _with_stream.refuses(
            ("streaming", "max_steps"),
            "nobody knows how many rows a stream has, so the number of steps must be given",
            "set max_steps",
            lambda run: run.training["max_steps"] < 1,
        ),
        _with_stream.refuses(
            ("max_samples", "streaming"),
            "is a number of rows of each dataset, while a stream is read as far as max_steps goes",
            "leave max_samples out, or streaming",
            is_given("data", "max_samples"),
        ),
        _with_stream.refuses(
            ("val_size", "streaming"),
            "is a share of all rows, and nobody knows how many rows a stream has",
            "write a whole number of rows",
            lambda run: 0 < run.data.val_size < 1,
        ),
        _with_stream.refuses(
            ("tokenized_path", "streaming"),
            "is written once all rows are tokenized, and a stream never has all of them",
            "leave streaming out for the run that writes it, or leave tokenized_path out",
            all_of(is_given("data", "tokenized_path"), not_(_has_tokenized_rows)),
        ),
        _with_stream.warns(
            ("streaming", "tokenized_path"),
            "is not read, since the rows in tokenized_path are tokenized already and stay on the disk",
            "leave it out",
            _has_tokenized_rows,
        ),
        _with_stream.refuses(
            ("streaming", "stage"),
            "the log-probabilities of the reference model are computed before training, which needs all rows",
            "leave streaming out, or use a loss without a reference, e.g. pref_loss: orpo or simpo",
            _scores_rows_first,
        ),
        _with_stream.warns(
            ("train_sampling_strategy", "streaming"),
            "is not followed, since rows of a stream are taken as they come",
            "leave it out",
            lambda run: run.training["train_sampling_strategy"] not in ("random", "sequential"),
        ),
        warning(
            ("buffer_size", "streaming"),
            "is not read here, only by streaming: true",
            "leave it out",
            all_of(is_changed("buffer_size"), not_(_streams)),
        ),
        at_least("data", "buffer_size", 1),
    )
)
