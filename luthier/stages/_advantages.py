"""Advantages: how much better than expected an answer, or one of its tokens, was.

B answers, T tokens of the longest, G answers per prompt, K tokens of all answers.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from luthier.stages import StageState
from luthier.stages._rollout import Totals

if TYPE_CHECKING:
    from torch import Tensor

EPSILON = 1e-4
"""Added to the standard deviation before dividing by it, as in the published code of GRPO."""


def gae(rewards: "Tensor", values: "Tensor", rows: "Tensor", *, gamma: float, lam: float) -> "Tensor":
    """Generalized advantage estimation (https://arxiv.org/abs/1506.02438, eq. 16): (K,) rewards and values -> (K,).

    delta_t = r_t + gamma V_t+1 - V_t and A_t = delta_t + gamma lam A_t+1 within each answer; both are 0 after its end.
    """
    import torch

    lengths = torch.bincount(rows)
    lengths = lengths[lengths > 0]
    position = torch.cat([torch.arange(length) for length in lengths.tolist()]).to(rows.device)
    row = torch.arange(len(lengths), device=rows.device).repeat_interleave(lengths)
    table = rewards.new_zeros(3, len(lengths), int(lengths.max()) + 1)
    table[0, row, position], table[1, row, position] = rewards, values
    reward, value, advantage = table
    for t in reversed(range(reward.shape[1] - 1)):
        delta = reward[:, t] + gamma * value[:, t + 1] - value[:, t]
        advantage[:, t] = delta + gamma * lam * advantage[:, t + 1]
    # Padding has reward and value 0, so it does not affect the last token of a short answer.
    return advantage[row, position]


def whitened(values: "Tensor", totals: Totals, *, shifts_mean: bool = True) -> "Tensor":
    """Scaled to variance 1 over all processes, and shifted to mean 0 if `shifts_mean`."""
    count = float(values.numel())
    sums = totals({"sum": (values.double().sum(), count), "squares": (values.double().square().sum(), count)})
    (total, count), (squares, _) = sums["sum"], sums["squares"]
    mean = total / count
    deviation = max(squares / count - mean * mean, 0.0) ** 0.5
    result = (values - mean) / (deviation + 1e-8)
    return result if shifts_mean else result + mean


def by_group_deviation(scores: "Tensor", num_generations: int) -> "Tensor":
    """(r - mean) / (std + epsilon) over the answers to one prompt (https://arxiv.org/abs/2402.03300)."""
    groups = scores.view(-1, num_generations)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + EPSILON)).flatten()


def by_group_mean(scores: "Tensor", num_generations: int) -> "Tensor":
    """r - mean, so that prompts with similar scores get no extra weight (https://arxiv.org/abs/2503.20783)."""
    groups = scores.view(-1, num_generations)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def leave_one_out(scores: "Tensor", num_generations: int) -> "Tensor":
    """r - mean of the other answers to the prompt (https://arxiv.org/abs/2402.14740, eq. 9)."""
    groups = scores.view(-1, num_generations)
    others = (groups.sum(1, keepdim=True) - groups) / (num_generations - 1)
    return (groups - others).flatten()


GroupAdvantages = Callable[["Tensor", int], "Tensor"]


def next_kl_coefficient(coefficient: float, kl: float, *, target: float, num_answers: float, horizon: float) -> float:
    """The adaptive controller of https://arxiv.org/abs/1909.08593, sec. 2.2.

    e = clip((KL - target) / target, -0.2, 0.2), coefficient <- coefficient (1 + e n / horizon).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * (1 + error * num_answers / horizon)


def add_moments(state: StageState, sums: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Running count, mean and sum of squared deviations of the scores, updated with a new rollout."""
    (total, count), (squares, _) = sums["score"], sums["score_squares"]
    mean, spread = total / count, squares - total * total / count
    count_before, mean_before = state.get("score_count", 0.0), state.get("score_mean", 0.0)
    all_count, delta = count_before + count, mean - mean_before
    return {
        "score_count": all_count,
        "score_mean": mean_before + delta * count / all_count,
        "score_spread": state.get("score_spread", 0.0) + spread + delta * delta * count_before * count / all_count,
    }
