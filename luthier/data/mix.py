"""The order of the rows of several datasets, with the semantics and random numbers of the library `datasets`.

The strategies of `mix_strategy`; D datasets, N rows in the result:
    concat              one dataset after the other
    interleave_under    alternate, until the first dataset is exhausted
    interleave_over     alternate, until every dataset is exhausted; the shorter ones restart
    interleave_once     alternate, until every dataset is exhausted; exhausted ones are skipped
With probabilities the next dataset is sampled instead of cycled. The same seed gives the order of
`datasets.interleave_datasets` and of `Dataset.train_test_split`; a test compares.
"""

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Literal

from luthier.config.keys.data import are_probabilities
from luthier.core.errors import DataError

if TYPE_CHECKING:
    import numpy as np

MixStrategy = Literal["concat", "interleave_under", "interleave_over", "interleave_once"]

DRAWS_PER_BLOCK = 1000
"""`datasets` draws in blocks of this size; another size gives another order for the same seed."""


def mix(
    lengths: Sequence[int], strategy: MixStrategy, probabilities: Sequence[float] | None = None, seed: int = 42
) -> "np.ndarray":
    """The order as an int64 array [N, 2] of (dataset, row). Without `probabilities` datasets alternate.

    Raises `DataError` for probabilities that cannot work: another count, negative, a sum other than 1, or 0 for a
    dataset that the strategy has to exhaust.
    """
    import numpy as np

    sizes = np.asarray(lengths, dtype=np.int64)
    if strategy == "concat":
        turns = np.repeat(np.arange(len(sizes)), sizes)
    elif probabilities:
        check_probabilities(lengths, strategy, probabilities)
        turns = _drawn_turns(sizes, strategy, probabilities, seed)
    else:
        turns = _cycled_turns(sizes, strategy)
    rows = np.empty_like(turns)
    for dataset, size in enumerate(sizes):
        places = np.flatnonzero(turns == dataset)
        rows[places] = np.arange(len(places)) % max(size, 1)
    return np.stack([turns, rows], axis=1)


def _cycled_turns(sizes: "np.ndarray", strategy: MixStrategy) -> "np.ndarray":
    import numpy as np

    if strategy == "interleave_over" and not sizes.all():
        raise DataError("mix_strategy interleave_over cannot repeat a dataset without rows")
    num_rounds = sizes.min() if strategy == "interleave_under" else sizes.max()
    rounds, datasets = np.divmod(np.arange(num_rounds * len(sizes)), len(sizes))
    return datasets[rounds < sizes[datasets]] if strategy == "interleave_once" else datasets


def _drawn_turns(sizes: "np.ndarray", strategy: MixStrategy, probabilities: Sequence[float], seed: int) -> "np.ndarray":
    """Draws until the strategy is satisfied; a dataset is exhausted by the draw that gives its last row."""
    import numpy as np

    generator = np.random.default_rng(seed)
    drawable = np.flatnonzero(np.asarray(probabilities) > 0)
    counts = np.zeros(len(sizes), dtype=np.int64)
    enough = np.any if strategy == "interleave_under" else np.all
    blocks = []
    while not enough(counts[drawable] >= sizes[drawable]):
        blocks.append(generator.choice(len(sizes), size=DRAWS_PER_BLOCK, p=list(probabilities)))
        counts += np.bincount(blocks[-1], minlength=len(sizes))
    draws = np.concatenate(blocks)
    if strategy == "interleave_once":
        first = [np.flatnonzero(draws == dataset)[:size] for dataset, size in enumerate(sizes)]
        return draws[np.sort(np.concatenate(first))]
    exhausted_at = [np.flatnonzero(draws == d)[sizes[d] - 1] for d in drawable if counts[d] >= sizes[d]]
    last = min(exhausted_at) if strategy == "interleave_under" else max(exhausted_at)
    return draws[: last + 1]


def check_probabilities(lengths: Sequence[int], strategy: MixStrategy, probabilities: Sequence[float]) -> None:
    given = ", ".join(map(str, probabilities))
    if len(probabilities) != len(lengths):
        raise DataError(f"interleave_probs: {len(probabilities)} numbers ({given}) for {len(lengths)} datasets")
    if not are_probabilities(tuple(probabilities)):
        raise DataError(f"interleave_probs: {given} are not probabilities: none below 0, and 1 together")
    if strategy != "interleave_under" and 0 in probabilities:
        raise DataError(f"interleave_probs: {given}: {strategy} never exhausts a dataset of probability 0")
    for index, (length, probability) in enumerate(zip(lengths, probabilities, strict=True)):
        if length == 0 and probability > 0:
            raise DataError(f"interleave_probs: dataset {index + 1} has no rows and cannot be drawn from")


def split_validation(examples: "np.ndarray", val_size: float, seed: int) -> "tuple[np.ndarray, np.ndarray]":
    """(train, eval) row indices: `val_size` examples for evaluation, or that fraction (rounded up) when it is below 1.

    examples: (rows,) the example of each row; all rows of an example go to the same side, so that nothing leaks.
    Both sides are shuffled with the seed. Raises `DataError` if no example would be left to train on.
    """
    import numpy as np

    distinct, example_of_row = np.unique(examples, return_inverse=True)
    num_examples = len(distinct)
    num_eval = ceil(val_size * num_examples) if val_size < 1 else int(val_size)
    if num_eval >= num_examples:
        raise DataError(f"val_size {val_size:g} takes {num_eval} of {num_examples} rows and leaves none to train on")
    rank = np.empty(num_examples, np.int64)
    rank[np.random.default_rng(seed).permutation(num_examples)] = np.arange(num_examples)
    order = np.argsort(rank[example_of_row], kind="stable")
    num_eval_rows = int((rank[example_of_row] < num_eval).sum())
    return order[num_eval_rows:], order[:num_eval_rows]


def sample_rows(num_rows: int, num_samples: int, seed: int) -> "np.ndarray":
    """`num_samples` random row indices: each row once; only the excess over `num_rows` is drawn with replacement."""
    import numpy as np

    generator = np.random.default_rng(seed)
    once = generator.permutation(num_rows)[:num_samples]
    if num_samples <= num_rows or num_rows == 0:
        return once
    return np.concatenate([once, generator.integers(num_rows, size=num_samples - num_rows)])
