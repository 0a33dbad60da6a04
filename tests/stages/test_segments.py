"""Sums over the tokens of each sequence."""

import torch

from luthier.stages._segments import summed


def test_they_are_those_of_index_add_with_its_gradients_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 5, (999,), generator=generator).sort().values + 1  # the first and the last have no token
    values = torch.randn(999, generator=generator, requires_grad=True)
    weights = torch.randn(7, generator=generator)
    found, expected = summed(values, rows, 7), torch.zeros(7).index_add(0, rows, values)
    assert torch.equal(found, expected) and found[0] == found[6] == 0
    gradients = [torch.autograd.grad((sums * weights).sum(), values)[0] for sums in (found, expected)]
    assert torch.equal(*gradients)


def test_without_tokens_they_are_0():
    assert summed(torch.empty(0), torch.empty(0, dtype=torch.long), 2).tolist() == [0, 0]
