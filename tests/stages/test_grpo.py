"""What grpo weighs and divides by, for each `loss_type`, by hand."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.data.collate import concatenate_rows, pad_rows
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


def test_the_spread_of_the_scores_of_a_group_is_a_mean_over_groups():
    total, count = group_targets(
        experience(), GrpoConfig(num_generations=2), state={}, totals=alone, max_new_tokens=8
    ).metrics["reward_spread"]
    assert (total.item(), count) == (pytest.approx(math.sqrt(2)), 1)


@pytest.mark.parametrize(("rewards", "is_told"), [([0.1] * 8, True), ([0.1] * 7 + [0.2], False)])
def test_groups_of_equal_rewards_are_told(rewards, is_told):
    spread = torch.tensor(rewards, dtype=torch.float64).std().item()
    assert ("the same reward" in STAGE.reporting.warns({"reward_spread": spread})) is is_told
    assert not STAGE.reporting.warns({"reward": 1.0}), "no answer was sampled since the last line"


@pytest.mark.parametrize("keys", [{}, {"num_iterations": 2}, {"grpo_beta": 0.1}])
def test_where_the_policy_has_moved_or_is_compared_its_first_probabilities_are_known(keys):
    plan = STAGE.rollout(GrpoConfig(**keys))
    assert plan.needs_policy_logps == bool(keys) and plan.num_passes == keys.get("num_iterations", 1)


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


@pytest.mark.parametrize("loss_type", LOSSES)
def test_the_loss_is_that_of_the_equations_when_the_policy_has_moved(loss_type):
    """Log-ratios 1, -1, 0.3 of one answer, -0.6 of another, within 0.8 and 1.5 or beyond, with the KL to a reference:
    the ratio of each token, or one for the whole answer (their mean 0.1, their sum 0.3)."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY_LLAMA)).double()
    rows = [{"input_ids": ids, "labels": [IGNORE_INDEX, *ids[1:]]} for ids in ([1, 2, 3, 4], [5, 6])]
    batch, logps = pad_rows(rows, pad_token_id=0), []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logps.append((model(ids).logits[0, :-1] / 0.7).log_softmax(-1).gather(-1, ids[0, 1:, None]).squeeze(-1))
    moved, gains, weights = (torch.tensor(one).double() for one in ([1, -1, 0.3, -0.6], [2, 2, 2, -1], [1, 0.5, 1, 2]))
    ours = torch.cat(logps)
    batch |= {"old_logps": ours.detach() - moved, "advantages": gains, "weights": weights, "temperature": 0.7}
    ratios = torch.cat([one - old for one, old in zip(logps, batch["old_logps"].split([3, 1]), strict=True)])
    if loss_type in ("gspo", "rloo"):
        answer = ratios[:3].mean() if loss_type == "gspo" else ratios[:3].sum()
        ratios = torch.cat([answer.expand(3), ratios[3:]])
    expected = -torch.minimum(ratios.exp() * gains, ratios.exp().clamp(0.8, 1.5) * gains)
    config = GrpoConfig(loss_type=loss_type, epsilon=0.2, epsilon_high=0.5, grpo_beta=0.3)
    if not LOSSES[loss_type].kl_in_score:
        batch["reference_logps"] = ours.detach() + torch.tensor([0.4, -0.2, 0.0, 1.0])
        behind = batch["reference_logps"] - ours
        expected = expected + 0.3 * (behind.exp() - 1 - behind)
    found = STAGE.loss(Models(model, inspect_head(model)), batch, config, state={}, training=True).total
    torch.testing.assert_close(found, (expected * weights).sum())
    learned = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(found, learned), torch.autograd.grad((expected * weights).sum(), learned), strict=True
    ):
        torch.testing.assert_close(one, other)
