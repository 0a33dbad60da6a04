"""What ppo and grpo learn from, against numbers worked out by hand and naive loops."""

import math
from typing import Any

import pytest
import torch

from luthier.stages import _advantages as advantages
from luthier.stages import _policy_loss as policy_loss
from luthier.stages._rollout import Experience
from luthier.stages.grpo import LOSSES, GrpoConfig
from luthier.stages.grpo import advantages as group_targets
from luthier.stages.ppo import PpoConfig
from luthier.stages.ppo import advantages as token_targets


def alone(sums: Any) -> dict[str, tuple[float, float]]:
    """The totals of one process."""
    return {name: (float(total), count) for name, (total, count) in sums.items()}


def test_gae_by_hand():
    """gamma 0.5, lambda 0.5; rewards 1, 2, V 4, 2: d2 = 2 - 2 = 0, d1 = 1 + 0.5 x 2 - 4 = -2, A = -2, 0.

    The second answer has one token: reward 3, V 1, A = 3 - 1 = 2.
    """
    rewards, values = torch.tensor([1.0, 2, 3]), torch.tensor([4.0, 2, 1])
    found = advantages.gae(rewards, values, torch.tensor([0, 0, 1]), gamma=0.5, lam=0.5)
    assert found.tolist() == [-2.0, 0.0, 2.0]


def test_gae_equals_a_naive_loop():
    torch.manual_seed(0)
    lengths = [3, 1, 7, 4]
    rewards, values = torch.randn(2, sum(lengths), dtype=torch.float64)
    rows = torch.arange(4).repeat_interleave(torch.tensor(lengths))
    expected = []
    for r, v in zip(rewards.split(lengths), values.split(lengths), strict=True):
        for t in range(len(r)):
            deltas = [r[k] + 0.9 * (v[k + 1] if k + 1 < len(v) else 0) - v[k] for k in range(t, len(r))]
            expected.append(sum((0.9 * 0.8) ** k * delta for k, delta in enumerate(deltas)))
    found = advantages.gae(rewards, values, rows, gamma=0.9, lam=0.8)
    torch.testing.assert_close(found, torch.stack(expected), atol=1e-12, rtol=0)


def test_advantages_of_groups_by_hand():
    """Scores 1, 3 | 2, 2: means 2 and 2, deviations sqrt(2) and 0."""
    scores = torch.tensor([1.0, 3, 2, 2], dtype=torch.float64)
    one = 1 / (math.sqrt(2) + 1e-4)
    assert advantages.by_group_deviation(scores, 2).tolist() == pytest.approx([-one, one, 0, 0])
    assert advantages.by_group_mean(scores, 2).tolist() == [-1, 1, 0, 0]
    assert advantages.leave_one_out(scores, 2).tolist() == [-2, 2, 0, 0]
    three = torch.tensor([1.0, 2, 6], dtype=torch.float64)  # others: 4, 3.5, 1.5
    assert advantages.leave_one_out(three, 3).tolist() == [-3, -1.5, 4.5]


def test_whitening_and_moments():
    values = torch.tensor([1.0, 2, 3, 6], dtype=torch.float64)  # mean 3, variance 3.5
    white = advantages.whitened(values, alone)
    assert white.tolist() == pytest.approx([(v - 3) / math.sqrt(3.5) for v in (1, 2, 3, 6)], abs=1e-6)
    kept = advantages.whitened(values, alone, shifts_mean=False)
    assert kept.mean().item() == pytest.approx(3) and kept.std(unbiased=False).item() == pytest.approx(1)
    state: dict[str, float] = {}
    for part in (values[:1], values[1:3], values[3:]):
        count = float(len(part))
        state |= advantages.add_moments(
            state, {"score": (part.sum().item(), count), "score_squares": (part.square().sum().item(), count)}
        )
    assert state["score_count"] == 4 and state["score_mean"] == pytest.approx(3)
    assert state["score_spread"] / 3 == pytest.approx(values.var().item())


def test_the_kl_controller_by_hand():
    """KL 9 at target 6: e = clip(0.5) = 0.2, beta = 0.2 (1 + 0.2 x 50 / 1000) = 0.202; KL 5.4: e = -0.1."""
    common = {"target": 6.0, "num_answers": 50.0, "horizon": 1000.0}
    assert advantages.next_kl_coefficient(0.2, 9.0, **common) == pytest.approx(0.202)
    assert advantages.next_kl_coefficient(0.2, 5.4, **common) == pytest.approx(0.2 * (1 - 0.1 * 0.05))


def test_the_clipped_loss_by_hand():
    """rho = 1.5 and 0.5, clip 0.2: with A = 1 the losses are -1.2 and -0.5, with A = -1 they are 1.5 and 0.8."""
    log_ratios = torch.tensor([1.5, 0.5, 1.5, 0.5], dtype=torch.float64).log().requires_grad_()
    advantage = torch.tensor([1.0, 1, -1, -1], dtype=torch.float64)
    losses, clipped = policy_loss.clipped_loss(log_ratios, advantage, low=0.2, high=0.2)
    assert losses.tolist() == pytest.approx([-1.2, -0.5, 1.5, 0.8])
    assert clipped.tolist() == [True, False, False, True]
    (gradient,) = torch.autograd.grad(losses.sum(), log_ratios)
    assert gradient.tolist() == pytest.approx([0, -0.5, 1.5, 0])
    higher, _ = policy_loss.clipped_loss(log_ratios, advantage, low=0.2, high=0.4)
    assert higher.tolist() == pytest.approx([-1.4, -0.5, 1.5, 0.8])


def test_the_value_loss_and_the_divergence_by_hand():
    """V 2, V_old 1, R 1, reach 0.2: 1/2 max(1, 0.04); and with R 3: 1/2 max(1, 1.8^2)."""
    losses = policy_loss.clipped_value_loss(
        torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]), reach=0.2
    )
    assert losses.tolist() == pytest.approx([0.5, 1.62])
    kl = policy_loss.reference_kl(torch.tensor([0.0, 0.0]), torch.tensor([math.log(2), 0.0]))
    assert kl.tolist() == pytest.approx([2 - math.log(2) - 1, 0.0])


BATCH = {"target_rows": torch.tensor([0, 0, 1]), "ends": torch.tensor([1, 2])}


def test_ratios_of_tokens_and_answers():
    logs = torch.tensor([0.1, 0.3, 0.5])
    assert policy_loss.token_ratio(logs, BATCH).tolist() == pytest.approx([0.1, 0.3, 0.5])
    assert policy_loss.mean_ratio(logs, BATCH).tolist() == pytest.approx([0.2, 0.2, 0.5])
    assert policy_loss.answer_ratio(logs, BATCH).tolist() == pytest.approx([0.4, 0.4, 0.5])


def experience(reference: float | None = None, values: float | None = None) -> Experience:
    """Two answers of two and one tokens with the scores 1 and 3."""
    logps = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64)
    return Experience(
        scores=torch.tensor([1.0, 3.0], dtype=torch.float64),
        stopped=torch.tensor([True, False]),
        rows=torch.tensor([0, 0, 1]),
        logps=logps,
        reference=None if reference is None else logps - reference,
        values=None if values is None else torch.full((3,), values, dtype=torch.float64),
    )


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


def test_rloo_takes_the_divergence_off_the_score():
    """KL of the answers is 0.2 and 0.1, so with beta 10 the scores are -1 and 2, and the advantages -3 and 3."""
    config = GrpoConfig(num_generations=2, loss_type="rloo", grpo_beta=10.0)
    targets = group_targets(experience(reference=0.1), config, state={}, totals=alone, max_new_tokens=8)
    assert targets.columns["advantages"].tolist() == pytest.approx([-3, -3, 3])
    assert "reference_logps" not in targets.columns


def test_the_rewards_of_ppo_by_hand():
    """beta 0.2, log-ratio 0.5 everywhere, V 0: rewards -0.1, 0.9 | 2.9; A = -0.1 + 0.95 x 0.9, 0.9, 2.9 = returns."""
    targets = token_targets(experience(0.5, 0.0), PpoConfig(), state={}, totals=alone, max_new_tokens=8)
    assert targets.columns["returns"].tolist() == pytest.approx([0.755, 0.9, 2.9])
    assert targets.columns["advantages"].mean().item() == pytest.approx(0, abs=1e-9)
    assert targets.units.tolist() == [2, 1]
    # KL per answer is 0.75, target 6: e = -0.2, two answers of 10,000.
    assert targets.state["kl_coefficient"] == pytest.approx(0.2 * (1 - 0.2 * 2 / 10_000))
    assert targets.metrics["kl"][0].item() / targets.metrics["kl"][1] == pytest.approx(0.75)


def test_scores_are_normalized_by_all_so_far():
    """1 and 3: mean 2, deviation sqrt(2)."""
    config = PpoConfig(ppo_score_norm=True)
    targets = token_targets(experience(0.0, 0.0), config, state={}, totals=alone, max_new_tokens=8)
    assert targets.columns["returns"][1:].tolist() == pytest.approx([-1 / math.sqrt(2), 1 / math.sqrt(2)])
    assert targets.state["score_count"] == 2
