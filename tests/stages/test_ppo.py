"""The rewards of ppo by hand, and scores normalized by all so far."""

import math

import pytest

from luthier.stages.ppo import PpoConfig
from luthier.stages.ppo import advantages as token_targets
from tests.stages.one_rollout import alone, experience


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
