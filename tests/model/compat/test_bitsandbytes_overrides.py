"""What the optimizers of bitsandbytes ask for in one run does not count in another."""

import pytest
import torch
from torch import nn

from luthier.model.compat.bitsandbytes_overrides import forgetting_overrides

optim = pytest.importorskip("bitsandbytes").optim


def moments(embedding: nn.Embedding) -> torch.dtype:
    optimizer = optim.AdamW8bit(embedding.parameters())
    embedding(torch.arange(64)).sum().backward()
    optimizer.step()
    return next(iter(optimizer.state.values()))["state1"].dtype


def test_overrides_end_with_their_run():
    manager = optim.GlobalOptimManager.get_instance()
    with forgetting_overrides():
        first = nn.Embedding(64, 64)
        manager.register_module_override(first, "weight", {"optim_bits": 32})
        assert moments(first) == torch.float32
    assert not manager.module_weight_config_triple
    assert moments(nn.Embedding(64, 64)) == torch.uint8
    manager.register_module_override(first, "weight", {"optim_bits": 32})
    with forgetting_overrides():
        assert moments(first) == torch.uint8
