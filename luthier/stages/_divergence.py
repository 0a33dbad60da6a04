"""Divergences between two distributions over the vocabulary, at each position.

P is the teacher (or reference), Q the student (or policy); c positions, V vocabulary. All take logits of shape (c, V)
and return (c,), with gradients through the student only.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def forward_kl(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """KL(P || Q) = sum_v P (log P - log Q): mode-covering, the student spreads over all that the teacher may say."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reverse_kl(student: "Tensor", teacher: "Tensor") -> "Tensor":
    """KL(Q || P) = sum_v Q (log Q - log P): mode-seeking, the student says only what the teacher may say."""
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def generalized_jsd(student: "Tensor", teacher: "Tensor", *, beta: float) -> "Tensor":
    """beta KL(P || M) + (1 - beta) KL(Q || M) with M = beta P + (1 - beta) Q (https://arxiv.org/abs/2306.13649, eq. 1).

    beta 0 gives the forward KL and beta 1 the reverse KL. They are its limits after division by beta and by 1 - beta.
    """
    import torch

    if beta == 0:
        return forward_kl(student, teacher)
    if beta == 1:
        return reverse_kl(student, teacher)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    weights = torch.tensor([beta, 1 - beta], dtype=log_q.dtype, device=log_q.device).log()
    log_m = torch.logsumexp(torch.stack([log_p + weights[0], log_q + weights[1]]), dim=0)
    of_teacher = (log_p.exp() * (log_p - log_m)).sum(-1)
    of_student = (log_q.exp() * (log_q - log_m)).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student
