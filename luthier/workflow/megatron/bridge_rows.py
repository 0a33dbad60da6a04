"""The rows of a run as Megatron-Bridge reads them: one after the other, over all epochs or evaluations, as if they were
one long table. Its sampler deals them out to the processes and skips what a resumed run has had."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from luthier.data.rows.labels import IGNORE_INDEX
from luthier.workflow.megatron import shifted_batch

if TYPE_CHECKING:
    import numpy as np

    from luthier.data.rows.table import Table


class TrainingRows:
    """Epoch after epoch, each shuffled in an order of its own."""

    def __init__(self, rows: "Table", length: int, seed: int | None, pad_token_id: int, block: int) -> None:
        """`length`: how many rows all steps take. `seed`: of the order; None keeps that of `rows`."""
        self.rows, self.length, self.seed = rows, length, seed
        self.collate_fn = partial(bridge_batch, pad_token_id=pad_token_id, block=block)
        self._shuffled: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        epoch, place = divmod(number, len(self.rows))
        return self.rows[place if self.seed is None else int(self._order(epoch, self.seed)[place])]

    def _order(self, epoch: int, seed: int) -> "np.ndarray":
        import numpy as np

        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = epoch, np.random.default_rng((seed, epoch)).permutation(len(self.rows))
        return self._shuffled[1]


class EvaluationRows:
    """The same rows for each evaluation, filled up to whole batches with rows that have no targets."""

    def __init__(self, rows: "Table", per_evaluation: int, length: int, pad_token_id: int, block: int) -> None:
        self.rows, self.per_evaluation, self.length = rows, per_evaluation, length
        self.collate_fn = partial(bridge_batch, pad_token_id=pad_token_id, block=block)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Mapping[str, Any]:
        place = number % self.per_evaluation
        if place < len(self.rows):
            return self.rows[place]
        row = self.rows[0]
        return {**row, "labels": [IGNORE_INDEX] * len(row["labels"])}


def bridge_batch(rows: Sequence[Mapping[str, Any]], pad_token_id: int, block: int) -> dict[str, Any]:
    """tokens, labels, position_ids (B, T) as whole numbers, loss_mask (B, T) in float32.

    Attention is causal and padding is on the right, so no mask of it is needed. A label without weight in the loss is
    0, since the kernels of Megatron-core take only tokens of the vocabulary.
    """
    import torch

    batch = shifted_batch(rows, pad_token_id, block)
    tokens, labels = batch["input_ids"], batch["labels"]
    return {
        "tokens": tokens,
        "labels": labels.clamp(min=0),
        "loss_mask": (labels != IGNORE_INDEX).float(),
        "position_ids": torch.arange(tokens.shape[1]).expand_as(tokens).contiguous(),
    }
