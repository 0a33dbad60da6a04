"""Advantages of tokens and groups, whitening and the KL controller: by hand and against naive loops."""

import math
from typing import Any

import pytest
import torch

from luthier.stages import _advantages as advantages


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
    assert advantages.whitened(torch.ones(3), alone).tolist() == [0.0, 0.0, 0.0]
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
