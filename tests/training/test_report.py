"""Plots and their smoothing."""

import pytest

from luthier.training.report import plot_history, smoothed


def test_a_constant_stays_constant():
    assert smoothed([2.0] * 7) == pytest.approx([2.0] * 7)


def test_three_points_by_hand():
    """Span 3, so the past weighs 1/2: (1/2 a) / (1/2), (1/4 a + 1/2 b) / (3/4), (1/8 a + 1/4 b + 1/2 c) / (7/8)."""
    assert smoothed([8.0, 4.0, 2.0]) == pytest.approx([8.0, (2 + 2) / 0.75, (1 + 1 + 1) / 0.875])


def test_one_plot_per_metric(tmp_path):
    history = [{"step": 1, "loss": 2.0, "rewards/accuracies": 0.1}, {"step": 2, "loss": 1.0, "rewards/accuracies": 0.2}]
    history.append({"step": 2, "eval_loss": 1.5, "eval_runtime": 3.0, "num_input_tokens_seen": 9})
    names = {path.name for path in plot_history(tmp_path, history)}
    assert names == {"training_loss.png", "training_rewards_accuracies.png", "training_eval_loss.png"}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
