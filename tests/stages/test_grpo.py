"""What grpo weighs and divides by, for each `loss_type`, by hand."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.data.collate import concatenate_rows
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.model.heads.output_head import inspect_head
from luthier.model.types import Models
from luthier.stages.grpo import LOSSES, STAGE, GrpoConfig
from luthier.stages.grpo import advantages as group_targets
from tests.stages.one_rollout import alone, experience
from tests.tiny import TINY_LLAMA


@pytest.mark.parametrize("loss_type", LOSSES)
def test_what_an_optimizer_step_is_divided_by(loss_type):
    """The weighted loss over the units is the mean that the paper names: over answers, tokens, or answers x limit."""
    config = GrpoConfig(num_generations=2, loss_type=loss_type)
    targets = group_targets(experience(), config, state={}, totals=alone, max_new_tokens=8)
    one = 1 / (math.sqrt(2) + 1e-4)
    each = {"dr_grpo": 1.0, "rloo": 2.0}.get(loss_type, one)
    assert targets.columns["advantages"].tolist() == pytest.approx([-each, -each, each])
    weights, units = targets.columns["weights"].tolist(), targets.units.sum().item()
    expected = {"dapo": ([1, 1, 1], 3), "dr_grpo": ([1, 1, 1], 16)}.get(loss_type, ([0.5, 0.5, 1], 2))
    assert (weights, units) == expected


def test_rloo_subtracts_the_kl_from_the_score():
    """KL of the answers is 0.2 and 0.1, so with beta 10 the scores are -1 and 2, and the advantages -3 and 3."""
    config = GrpoConfig(num_generations=2, loss_type="rloo", grpo_beta=10.0)
    targets = group_targets(experience(reference=0.1), config, state={}, totals=alone, max_new_tokens=8)
    assert targets.columns["advantages"].tolist() == pytest.approx([-3, -3, 3])
    assert "reference_logps" not in targets.columns


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_loss_is_the_weighted_sum_over_the_tokens(loss_type):
    """The policy has just sampled the answer, so each ratio is 1, and the loss of a token is -A."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY_LLAMA))
    batch = concatenate_rows([{"input_ids": [1, 2, 3, 4], "labels": [IGNORE_INDEX, 2, 3, 4]}])
    batch |= {
        "advantages": torch.tensor([2.0, 2.0, 2.0]),
        "weights": torch.tensor([1.0, 0.5, 0.25]),
        "temperature": 1.0,
    }
    models, config = Models(model, inspect_head(model)), GrpoConfig(loss_type=loss_type)
    assert STAGE.loss(models, batch, config, state={}, training=True).total.item() == pytest.approx(-3.5)
