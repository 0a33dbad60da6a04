"""An objective summed in chunks of the vocabulary has the gradients of the whole."""

import pytest
import torch

from luthier.model.heads.objective import Predictions, summed_objective
from luthier.model.kernels import chunked_head
from luthier.stages._divergence import generalized_jsd


@pytest.mark.parametrize("chunk_elements", [1, 2**26])
@pytest.mark.parametrize("at_once", [1, 77, 2**26])
def test_an_objective_in_chunks_has_the_gradients_of_the_whole(monkeypatch, chunk_elements, at_once):
    for limit in ("CHUNK_ELEMENTS", "SMALL_CHUNK_ELEMENTS"):
        monkeypatch.setattr(chunked_head, limit, chunk_elements)
    for limit in ("OBJECTIVE_ELEMENTS", "SMALL_OBJECTIVE_ELEMENTS"):
        monkeypatch.setattr(chunked_head, limit, at_once)
    torch.manual_seed(0)
    sources = torch.randn(150, 8).double(), torch.randn(11, 8).double(), torch.randn(11).double()
    teacher = torch.randn(150, 11).double()
    ours, theirs = [[tensor.clone().requires_grad_() for tensor in sources] for _ in range(2)]

    def compare(own, others, part):
        assert torch.equal(others, teacher[part])
        return generalized_jsd(own, others, beta=0.3)

    loss = summed_objective(Predictions(*ours), compare, Predictions(teacher))
    expected = generalized_jsd(theirs[0] @ theirs[1].T + theirs[2], teacher, beta=0.3).sum()
    torch.testing.assert_close(loss, expected)
    (2 * loss).backward()
    (2 * expected).backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)
    with torch.no_grad():
        evaluated = summed_objective(Predictions(*(one.detach() for one in ours)), compare, Predictions(teacher))
    torch.testing.assert_close(evaluated, expected.detach())
