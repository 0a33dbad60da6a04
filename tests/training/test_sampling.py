"""Each epoch has its order, whatever was drawn before it and however many processes read it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader, RandomSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from luthier.training.sampling import begin_epoch, by_epoch

LENGTHS = [number % 7 + 1 for number in range(24)]


def seeded(seed: int) -> Any:
    return SimpleNamespace(seed=7, data_seed=seed)


def grouped(seed: int = 3) -> LengthGroupedSampler:
    return by_epoch(LengthGroupedSampler(2, lengths=LENGTHS), seeded(seed))


def test_rows_of_like_lengths_have_an_order_of_their_own_in_each_epoch():
    first, second = grouped(), grouped()
    orders = [list(first)]
    first.set_epoch(1)
    orders.append(list(first))
    assert orders[0] != orders[1] and all(sorted(order) == list(range(24)) for order in orders)
    torch.rand(7)  # as dropout does
    assert orders[0] == list(second) != list(grouped(seed=4))


def test_balanced_batches_follow_the_seed():
    orders = [list(by_epoch(BatchRebalanceSampler(LENGTHS, 4, 1, 2), seeded(seed))) for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("kind", ["random", "grouped", "balanced"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_resumed_run_skips_rows_in_the_order_of_its_epoch(kind, num_processes):
    def loader() -> DataLoader:
        words = {
            "random": lambda: {"sampler": RandomSampler(LENGTHS), "batch_size": 2},
            "grouped": lambda: {"sampler": grouped(), "batch_size": 2},
            "balanced": lambda: {"batch_sampler": by_epoch(BatchRebalanceSampler(LENGTHS, 4, 1, 2), seeded(3))},
        }[kind]()
        given = DataLoader(range(24), **words)
        return prepare_data_loader(
            given, num_processes=num_processes, process_index=0, use_seedable_sampler=True, data_seed=3
        )

    uninterrupted = loader()
    begin_epoch(uninterrupted, 0)
    first = [batch.tolist() for batch in uninterrupted]
    begin_epoch(uninterrupted, 1)
    second = [batch.tolist() for batch in uninterrupted]
    resumed = loader()
    begin_epoch(resumed, 1)
    resumed = skip_first_batches(resumed, 2)
    resumed.set_epoch(1)
    assert [batch.tolist() for batch in resumed] == second[2:] != first[2:]


def test_the_sampler_is_found_below_all_others():
    sampler = SeedableRandomSampler(range(4))
    inner = torch.utils.data.BatchSampler(sampler, 2, drop_last=False)
    loader = DataLoader(range(4), batch_sampler=BatchSamplerShard(BatchSamplerShard(inner)))
    begin_epoch(loader, 5)
    assert sampler.epoch == 5
