"""The clipped loss, the value loss and the ratios of ppo and grpo, by hand."""

import math

import pytest
import torch

from luthier.stages import _policy_loss as policy_loss


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
        torch.tensor([2.0, 2.0]), torch.tensor([1.0, 1.0]), torch.tensor([1.0, 3.0]), clip_range=0.2
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
