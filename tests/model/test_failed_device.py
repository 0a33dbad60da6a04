"""Whether an error is that of what was computed or of a device that computes nothing more."""

import pytest
import torch

from luthier.core.errors import DeviceFailed
from luthier.model.failed_device import require_working_device
from tests.broken_cuda import ASSERTION, break_cuda

FAULT = ValueError("this row is wrong")


def test_a_fault_of_a_row_on_a_device_that_works(monkeypatch):
    require_working_device(FAULT)
    break_cuda(monkeypatch, None)
    require_working_device(FAULT)


def test_every_fault_after_that_of_the_device_is_one_of_the_device(monkeypatch):
    break_cuda(monkeypatch, torch.AcceleratorError(f"{ASSERTION}\nmore lines"))
    with pytest.raises(DeviceFailed, match=r"^cuda:1 has failed \(.*assert triggered\), .* -> start again") as found:
        require_working_device(FAULT)
    assert found.value.__cause__ is FAULT


def test_a_failure_that_was_told_stays_as_it_is(monkeypatch):
    failure = DeviceFailed("cuda:1 has failed")
    with pytest.raises(DeviceFailed) as found:
        require_working_device(failure)
    assert found.value is failure


@pytest.mark.parametrize("refusal", [torch.OutOfMemoryError("no"), torch.AcceleratorError("CUDA error: out of memory")])
def test_a_device_without_memory_works(monkeypatch, refusal):
    break_cuda(monkeypatch, refusal)
    require_working_device(refusal)
