"""Activations in main memory give the same gradients."""

from types import SimpleNamespace

import pytest
import torch

from luthier.model.kernels import offloading
from luthier.model.kernels.offloading import offloaded


def test_on_a_cpu_saved_tensors_are_not_copied():
    weight = torch.ones(3, requires_grad=True)
    with offloaded():
        squares = weight * weight
    assert squares.grad_fn._saved_self.data_ptr() == weight.data_ptr()
    squares.sum().backward()
    torch.testing.assert_close(weight.grad, 2 * weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_offloaded_tensors_leave_the_device():
    weight = torch.ones(1000, 1000, device="cuda", requires_grad=True)
    with offloaded():
        total = (weight * weight).sum()
    total.backward()
    torch.testing.assert_close(weight.grad, 2 * weight)


def test_on_the_way_back_the_device_waits_for_the_copy_and_the_host_does_not(monkeypatch):
    waits, copied = [], object()
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: SimpleNamespace(wait_event=waits.append))
    found = offloading._copy_back((torch.ones(2), copied, torch.device("meta")))
    assert found.is_meta and waits == [copied]
