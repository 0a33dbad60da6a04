"""Where the samples of a row are, and which tokens they share."""

import gc

import torch

from luthier.model.kernels import samples
from luthier.model.kernels.samples import bounds_of, numbers_of, samples_of


def test_bounds_are_read_once_and_not_kept():
    bounds = torch.tensor([0, 3, 8], dtype=torch.int32)
    first = samples_of(bounds, None)
    assert first.lengths == [3, 5] and first.longest == first.longest_with_prefix == 5
    assert samples_of(bounds, None) is first
    with_prefixes = samples_of(bounds, torch.tensor([[0, 0], [1, 2]]))
    assert with_prefixes.longest_with_prefix == 7
    assert with_prefixes.key_tokens.tolist() == [0, 1, 2, 1, 2, 3, 4, 5, 6, 7]
    num_known = len(samples._known())
    del bounds
    gc.collect()
    assert len(samples._known()) == num_known - 1


def test_prefixes_of_several_runs():
    bounds = torch.tensor([0, 3, 5, 6], dtype=torch.int32)
    row = samples_of(bounds, torch.tensor([[0, 0, 0, 0], [0, 2, 0, 0], [0, 2, 3, 1]]))
    assert row.own == [(0, 3), (3, 2), (5, 1)] and row.prefixes == [(), ((0, 2),), ((0, 2), (3, 1))]
    assert row.lengths == [3, 2, 1] and [row.num_before(sample) for sample in range(3)] == [0, 2, 3]
    assert row.key_bounds.tolist() == [0, 3, 7, 11]
    assert row.key_tokens.tolist() == [0, 1, 2, 0, 1, 3, 4, 0, 1, 3, 5]


def test_bounds_that_were_made_here_are_not_read():
    bounds = bounds_of([3, 5], torch.device("meta"))
    assert samples_of(bounds, None).own == [(0, 3), (3, 5)] and numbers_of(bounds) == [0, 3, 8]
    assert bounds_of([3, 5], torch.device("cpu")).tolist() == [0, 3, 8]
