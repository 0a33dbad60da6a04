"""What one optimizer of bitsandbytes asks for does not count for the next one."""

import pytest
import torch
from torch import nn

from luthier.model.compat.bitsandbytes_overrides import forget_overrides

optim = pytest.importorskip("bitsandbytes").optim


def moments(embedding: nn.Embedding) -> torch.dtype:
    optimizer = optim.AdamW8bit(embedding.parameters())
    embedding(torch.arange(64)).sum().backward()
    optimizer.step()
    return next(iter(optimizer.state.values()))["state1"].dtype


def test_overrides_end_with_their_optimizer():
    forget_overrides()
    first = nn.Embedding(64, 64)
    manager = optim.GlobalOptimManager.get_instance()
    manager.register_module_override(first, "weight", {"optim_bits": 32})
    assert moments(first) == torch.float32
    forget_overrides()
    assert moments(nn.Embedding(64, 64)) == torch.uint8
    assert optim.GlobalOptimManager.get_instance() is manager and not manager.module_weight_config_triple
