"""The rewards of ppo by hand, scores normalized by all so far, and the fast path of models with experts."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from luthier.data.collate import concatenate_rows, model_inputs, pad_rows
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.model.attention import isolate_samples
from luthier.model.heads.output_head import inspect_head
from luthier.model.heads.value_head import add_value_head, logps_and_values
from luthier.model.kernels.fuse import fuse
from luthier.model.types import Models
from luthier.stages.ppo import STAGE, PpoConfig
from luthier.stages.ppo import advantages as token_targets
from luthier.training.parts import collator
from tests.stages.one_rollout import alone, experience
from tests.tiny import TINY_LLAMA


def test_the_rewards_of_ppo_by_hand():
    """beta 0.2, log-ratio 0.5 everywhere, V 0: rewards -0.1, 0.9 | 2.9; A = -0.1 + 0.95 x 0.9, 0.9, 2.9 = returns."""
    targets = token_targets(experience(0.5, 0.0), PpoConfig(), state={}, totals=alone, max_new_tokens=8)
    assert targets.columns["returns"].tolist() == pytest.approx([0.755, 0.9, 2.9])
    assert targets.columns["advantages"].mean().item() == pytest.approx(0, abs=1e-9)
    assert targets.units.tolist() == [2, 1]
    # KL per answer is 0.75, target 6: e = -0.2, two answers of 10,000.
    assert targets.state["kl_coefficient"] == pytest.approx(0.2 * (1 - 0.2 * 2 / 10_000))
    assert targets.metrics["kl"][0].item() / targets.metrics["kl"][1] == pytest.approx(0.75)


def test_returns_are_advantages_plus_values():
    """V 1 everywhere: delta = -0.1, -0.1 | 1.9, so A = -0.195, -0.1, 1.9, and the returns are 1 more."""
    targets = token_targets(experience(0.5, 1.0), PpoConfig(), state={}, totals=alone, max_new_tokens=8)
    assert targets.columns["returns"].tolist() == pytest.approx([0.805, 0.9, 2.9])


def test_token_rewards_are_scaled_around_their_mean():
    """Rewards -0.1, 0.9 | 2.9 as above have the mean 37/30 and the variance 14/9."""
    config = PpoConfig(ppo_whiten_rewards=True)
    targets = token_targets(experience(0.5, 0.0), config, state={}, totals=alone, max_new_tokens=8)
    first, second, third = ((reward - 37 / 30) / math.sqrt(14 / 9) + 37 / 30 for reward in (-0.1, 0.9, 2.9))
    assert targets.columns["returns"].tolist() == pytest.approx([first + 0.95 * second, second, third])


def test_the_kl_of_an_answer_is_compared_with_the_target():
    """0.75 instead of 0.8: e = -1/16, within its bounds."""
    config = PpoConfig(ppo_target=0.8)
    targets = token_targets(experience(0.5, 0.0), config, state={}, totals=alone, max_new_tokens=8)
    assert targets.state["kl_coefficient"] == pytest.approx(0.2 * (1 - 2 / 16 / 10_000), rel=1e-9)
    assert targets.metrics["kl_coefficient"][0].item() == pytest.approx(0.2), "with which this rollout was rewarded"


def test_scores_are_normalized_by_all_so_far():
    """1 and 3: mean 2, deviation sqrt(2)."""
    config = PpoConfig(ppo_score_norm=True)
    targets = token_targets(experience(0.0, 0.0), config, state={}, totals=alone, max_new_tokens=8)
    assert targets.columns["returns"][1:].tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])
    assert targets.state["score_count"] == 2


@pytest.mark.parametrize("is_linear", [True, False], ids=["chunked head", "plain logits"])
def test_the_loss_is_that_of_the_equations(is_linear):
    """Ratios and values within and beyond their bounds, by autograd on the written-out formula."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY_LLAMA)).double().eval()
    layer = add_value_head(model)
    torch.nn.init.normal_(layer.weight, std=0.1)
    head = replace(inspect_head(model), value=layer)
    head = head if is_linear else replace(head, linear=None)
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, 8, 9]}, {"input_ids": [3, 4], "labels": [-100, 4]}]
    batch = {**pad_rows(rows, pad_token_id=0), "temperature": 0.7}
    states = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state.flatten(0, 1)
    states = states[batch["positions"]]
    logps = (model.lm_head(states) / 0.7).log_softmax(-1).gather(-1, batch["targets"][:, None]).squeeze(-1)
    values = layer(states.float()).squeeze(-1)
    batch["old_logps"] = logps.detach() + torch.tensor([0.1, -0.5, 0.5, -0.1])
    batch["old_values"] = values.detach() + torch.tensor([0.1, -0.5, 0.5, -0.1])
    batch["advantages"] = torch.tensor([1.0, 2.0, -3.0, -0.5])
    batch["returns"] = values.detach() + torch.tensor([0.3, -0.4, -2.0, 0.2])
    ratio, gain = (logps - batch["old_logps"]).exp(), batch["advantages"]
    policy = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain)
    near = torch.maximum(torch.minimum(values, batch["old_values"] + 0.2), batch["old_values"] - 0.2)
    value = torch.maximum((values - batch["returns"]) ** 2, (near - batch["returns"]) ** 2) / 2
    expected = policy.sum() + 0.1 * value.sum()
    found = STAGE.loss(Models(model, head), batch, PpoConfig(), state={}, training=True)
    torch.testing.assert_close(found.total, expected, rtol=1e-6, atol=1e-6)
    assert found.metrics["clip_fraction"][0] == 2 and found.metrics["clip_fraction"][1] == 4
    weights = list(model.parameters())
    for one, other in zip(
        torch.autograd.grad(found.total, weights), torch.autograd.grad(expected, weights), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


ROUTED = {
    "qwen3_moe": Qwen3MoeConfig(
        **{**TINY_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    ),
    "mixtral": MixtralConfig(**{**TINY_LLAMA, "num_local_experts": 4}),
}


def trained(
    config: Any, *, fast: bool, optimizer: type[torch.optim.Optimizer], lr: float
) -> list[dict[str, torch.Tensor]]:
    """The gradients of the first of four steps on one batch of answers, and the weights after the last."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config).train()
    if fast:
        fuse(model)
        isolate_samples(model)
    models = Models(model, replace(inspect_head(model), value=add_value_head(model)))
    drawn = torch.Generator().manual_seed(1)
    rows = []
    for num_prompt, num_answer in ((9, 4), (14, 6), (5, 2), (20, 5)):
        ids = torch.randint(0, 256, (num_prompt + num_answer,), generator=drawn).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORE_INDEX] * num_prompt + ids[num_prompt:]})
    batch = collator(TINY_LLAMA["pad_token_id"], concatenate_rows if fast else None)(rows)
    where = (model_inputs(batch), batch["positions"], batch["targets"])
    with torch.no_grad():
        batch["old_logps"], batch["old_values"] = logps_and_values(model, models.head, *where, temperature=1.0)
    batch["advantages"], batch["returns"] = torch.randn(2, len(batch["targets"]), generator=drawn)
    steps, gradients = optimizer(model.parameters(), lr=lr), []
    for _ in range(4):
        loss = STAGE.loss(models, {**batch, "temperature": 1.0}, PpoConfig(), state={}, training=True).total
        (loss / len(batch["targets"])).backward()
        gradients.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
        steps.step()
        steps.zero_grad()
    return [gradients[0], {name: weight.detach() for name, weight in model.named_parameters()}]


@pytest.mark.parametrize("name", ROUTED)
def test_experts_learn_the_same_on_the_fast_path(name):
    """Rows without padding through fused layers, against padded rows through the model's own. The gradients differ by
    rounding alone, and so do weights that move in proportion to them (SGD). AdamW moves a weight as far for a gradient
    that is nearly zero, which rounding decides, as for any other: there the two drift apart from the first update on,
    by 2e-5 here, where each step moves weights by 1e-3."""

    def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        assert one.keys() == other.keys()
        return max(float((one[key] - other[key]).abs().max()) for key in one)

    for optimizer, lr, drift in ((torch.optim.SGD, 0.1, 1e-6), (torch.optim.AdamW, 1e-3, 1e-4)):
        fast, plain = (trained(ROUTED[name], fast=fast, optimizer=optimizer, lr=lr) for fast in (True, False))
        for key, gradient in plain[0].items():
            assert (fast[0][key] - gradient).norm() <= 2e-6 * gradient.norm() + 1e-9, key
        assert apart(fast[1], plain[1]) < drift
