"""All-to-all between the processes of a group, with gradients."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_to_all_single


def exchange(blocks: Tensor, group: ProcessGroup) -> Tensor:
    """(P, ...) -> (P, ...): block r goes to process r of the group, and block s of the result is from process s."""
    received: Tensor = Exchange.apply(blocks, group)
    return received


class Exchange(torch.autograd.Function):
    """y_r[s] = x_s[r], which is linear, so d loss / d x_s[r] = d loss / d y_r[s]: the gradients are exchanged in the
    same way."""

    @staticmethod
    def forward(ctx, blocks, group):
        ctx.group = group
        return _exchanged(blocks, group)

    @staticmethod
    def backward(ctx, d_received):
        return _exchanged(d_received, ctx.group), None


def _exchanged(blocks: Tensor, group: ProcessGroup) -> Tensor:
    blocks = blocks.contiguous()
    received = torch.empty_like(blocks)
    all_to_all_single(received, blocks, group=group)
    return received
