"""What the plan knows of the states of optimizers is what they hold."""

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from luthier.model.compat.bitsandbytes_overrides import forgetting_overrides
from luthier.workflow.plan.states import ADAMW, STATES, states_bytes
from tests.matrix import representatives

HERE = (
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("ademamix", "ademamix_8bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
"""Those that run on a CPU, with libraries that the tests install."""


class Small(nn.Module):
    """An embedding, a matrix, a matrix of fewer numbers than have 8 bits, and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(320, 64)
        self.wide = nn.Linear(64, 500, bias=False)
        self.narrow = nn.Linear(64, 3, bias=False)
        self.frozen = nn.Linear(64, 64, bias=False).requires_grad_(False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.embedding(input_ids))
        return self.wide(hidden).sum() + self.narrow(hidden).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("optim", representatives(HERE, "adamw_torch", "ademamix", "adamw_8bit", "lion_8bit"))
def test_states_are_as_large_as_planned(optim, dtype, tmp_path):
    model = Small().to(dtype)
    with forgetting_overrides():
        optimizer = Trainer(model, TrainingArguments(str(tmp_path), optim=optim, use_cpu=True)).create_optimizer()
        model(torch.arange(320)[None]).backward()
        optimizer.step()
    states = [value for state in optimizer.state.values() for name, value in state.items() if "qmap" not in name]
    held = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    weights = sum(weight.nbytes for weight in model.parameters())
    assert held / weights == pytest.approx(states_bytes(optim, model) / weights, rel=0.01, abs=0.04)


def test_a_process_has_the_states_of_its_part():
    model = Small()
    assert (
        states_bytes("adamw_torch", model, lambda weight: weight.numel() // 2) == states_bytes("adamw_torch", model) / 2
    )


def test_torchao_keeps_tensors_that_are_no_whole_blocks():
    """Its optimizers quantize from 4,096 numbers on, in blocks of 256 or 128, and know no embeddings."""
    eight, four = STATES["adamw_torch_8bit"], STATES["adamw_torch_4bit"]
    assert eight.num_bytes(4096, 2, is_embedding=True) == 2 * (4096 + 16 * 4)
    assert four.num_bytes(4096, 2, is_embedding=True) == 2 * (2048 + 32 * 4)
    assert eight.num_bytes(4096 + 128, 2, is_embedding=False) == ADAMW.num_bytes(4096 + 128, 2, is_embedding=False)
    assert four.num_bytes(4096 + 128, 2, is_embedding=False) == 2 * (2112 + 33 * 4)
    assert four.num_bytes(4095, 2, is_embedding=False) == 2 * 4095 * 2


def test_every_optimizer_of_the_table_exists():
    assert set(STATES) <= {str(name.value) for name in OptimizerNames}
