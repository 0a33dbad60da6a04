"""What the plan knows of optimizers is what they hold."""

import pytest
import torch
from transformers import Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from luthier.workflow.plan.memory import STATES
from tests.matrix import representatives

HERE = (
    *("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"),
    *("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"),
    *("ademamix", "ademamix_8bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
"""Those that run on a CPU, with libraries that the tests install."""


@pytest.mark.parametrize("optim", representatives(HERE, "adamw_torch", "ademamix", "adamw_8bit", "lion_8bit"))
def test_states_are_as_large_as_planned(optim, tmp_path):
    layer = torch.nn.Linear(4096, 512, bias=False)
    arguments = TrainingArguments(str(tmp_path), optim=optim, report_to="none", use_cpu=True)
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = kind(layer.parameters(), **settings)
    layer(torch.ones(2, 4096)).sum().backward()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    held = sum(value.nbytes for value in states if isinstance(value, torch.Tensor))
    assert held / layer.weight.nbytes == pytest.approx(STATES.get(optim, 2.0), rel=0.01, abs=0.01)


def test_every_optimizer_of_the_table_exists():
    assert set(STATES) <= {str(name.value) for name in OptimizerNames}
