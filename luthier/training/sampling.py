"""The order in which an epoch reads its rows: the same in a resumed run and in every process.

The seed and the number of the epoch decide it, and nothing else does.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

if TYPE_CHECKING:
    from transformers import TrainingArguments


class LengthGroupedEpochs(LengthGroupedSampler):
    """transformers draws the order from the random numbers of the process, which dropout uses too."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int) -> None:
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()


def by_epoch(sampler: Any, args: "TrainingArguments") -> Any:
    """A sampler of transformers whose order the seed and the epoch decide; of random ones accelerate makes such."""
    seed = args.seed if args.data_seed is None else args.data_seed
    if isinstance(sampler, BatchRebalanceSampler):
        sampler.seed = seed
    if not isinstance(sampler, LengthGroupedSampler):
        return sampler
    return LengthGroupedEpochs(sampler.batch_size, sampler.lengths, seed)


def begin_epoch(loader: Any, epoch: int) -> None:
    """Tell the sampler of `loader` the number of the epoch, however many samplers for batches are around it.

    transformers does so once the batches before a checkpoint are skipped. With several processes a sampler by length is
    then too deep for it, and a resumed run would go on in the order of the first epoch.
    """
    around = loader
    while (around := getattr(around, "batch_sampler", None)) is not None:
        samplers: tuple[Any, ...] = (around, getattr(around, "sampler", None))
        for sampler in samplers:
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
