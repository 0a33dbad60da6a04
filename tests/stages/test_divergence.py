"""The divergences of distillation, by hand and at the ends of beta."""

import math

import pytest
import torch

from luthier.stages._divergence import forward_kl, generalized_jsd, reverse_kl


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_divergences_by_hand():
    """P = (1/2, 1/2), Q = (1/4, 3/4).

    KL(P || Q) = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3, KL(Q || P) = 1/4 ln 1/2 + 3/4 ln 3/2. With beta = 1/2,
    M = (3/8, 5/8) and the divergence is half of KL(P || M) + KL(Q || M).
    """
    student, teacher = logits(0.25, 0.75), logits(0.5, 0.5)
    assert forward_kl(student, teacher).item() == pytest.approx(math.log(4 / 3) / 2)
    assert reverse_kl(student, teacher).item() == pytest.approx(math.log(1 / 2) / 4 + 3 * math.log(3 / 2) / 4)
    of_teacher = math.log(4 / 3) / 2 + math.log(4 / 5) / 2
    of_student = math.log(2 / 3) / 4 + 3 * math.log(6 / 5) / 4
    assert generalized_jsd(student, teacher, beta=0.5).item() == pytest.approx((of_teacher + of_student) / 2)


def test_the_ends_of_beta_are_the_two_kls():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 9).double(), torch.randn(5, 9).double()
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=0.0), forward_kl(student, teacher))
    torch.testing.assert_close(generalized_jsd(student, teacher, beta=1.0), reverse_kl(student, teacher))
    near_forward = generalized_jsd(student, teacher, beta=1e-6) / 1e-6
    torch.testing.assert_close(near_forward, forward_kl(student, teacher), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(forward_kl(teacher, teacher), torch.zeros(5).double())
