"""Autocast of tensors without data. If the first test fails, `autocast_without_data` can go."""

import pytest
import torch

from luthier.model.compat.autocast_without_data import autocast_of_cpu


def test_torch_has_no_autocast_without_data():
    with pytest.raises(RuntimeError, match="unsupported scalarType"):
        torch.autocast("meta", enabled=False)


def test_it_is_that_of_the_cpu_for_a_while():
    usual = torch.autocast
    with torch.autocast("cpu", dtype=torch.bfloat16), autocast_of_cpu():
        with torch.autocast("meta", enabled=False):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")
    assert torch.autocast is usual
