"""Losses of a linear head, with the logits of one chunk of positions in memory at a time.

Letters: K positions, H hidden size, V vocabulary, c positions of a chunk.
Shapes: hidden (K, H), weight (V, H), bias (V,) or None, targets (K,).
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from luthier.model.kernels.products import format_here, product, usual_product
from luthier.model.kernels.repeats import slices
from luthier.model.kernels.varlen import stands_for_a_gpu

CHUNK_ELEMENTS = 2**26
"""Logits held at a time: 64 Mi numbers, 256 MB in float32."""
SMALL_CHUNK_ELEMENTS = 2**24
"""On a CPU, where a chunk of 64 MB takes no more time, unless a gradient of the weight is summed over chunks."""
SCALED_ROWS = 8192
"""Rows of a 16-bit gradient that are in float32 at a time."""
OBJECTIVE_ELEMENTS = 2**24
"""Logits that an objective is given at a time. What it computes with them is a dozen times as large."""
SMALL_OBJECTIVE_ELEMENTS = 2**22
"""On a CPU, whose caches hold a part of it then."""
BLOCK = 128
"""Largest logits are found in blocks of so many."""
Weigh = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(logits (c, V), their log-normalizer (c, 1), targets (c,)) -> the weight of each target, (c,)."""
Objective = Callable[[Tensor, Tensor, slice], Tensor]
"""(logits (b, V) in float32 or wider, what they are compared with (b, W), which of the K positions these are) -> a loss
for each of them, (b,)."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    label_smoothing: float = 0.0,
    *,
    weights: Tensor | None = None,
    weigh: Weigh | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_k w_k CE(hidden_k W^T + b, target_k), a scalar, and the (K,) most likely ids.

    w is the product of `weights` and what `weigh` returns, 1 without them; no gradient flows through it.
    """
    if not torch.is_grad_enabled():  # asked here: in `forward` it is always off, and a weight says that it needs one
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    return LinearCrossEntropy.apply(hidden, weight, bias, targets, label_smoothing, weights, weigh)


def linear_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float = 1.0
) -> Tensor:
    """log softmax((hidden_k W^T + b) / temperature)[target_k], (K,) with gradients."""
    logps: Tensor = LinearLogProbs.apply(hidden, weight, bias, targets, temperature)
    return logps


def chunked_objective(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, objective: Objective, beside: Callable[[slice], Tensor]
) -> Tensor:
    """sum_k objective(hidden_k W^T + b, beside_k), a scalar with gradients of the first. `beside`: part -> (c, W)."""
    total: Tensor = ChunkedObjective.apply(hidden, weight, bias, objective, beside)
    return total


class LinearCrossEntropy(torch.autograd.Function):
    """With p = softmax(logits) and q the (smoothed) target distribution, d loss / d logits = w (p - q).

    So the gradients of hidden, weight and bias are computed chunk by chunk in the forward pass, and only scaled in the
    backward pass.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, label_smoothing, weights, weigh):
        grads = _gradients(ctx, hidden, weight, bias)
        matrix, own_bias = in_format_of(hidden, weight, bias)
        total = torch.zeros((), dtype=at_least_float32(hidden.dtype), device=hidden.device)
        best = torch.empty_like(targets)
        for part in _chunks(hidden, weight):
            logits = product(hidden[part], matrix, own_bias)
            own = None if weights is None else weights[part]
            best[part] = most_likely(logits)
            loss, d_logits = _chunk_loss(logits.to(total.dtype), targets[part], label_smoothing, own, weigh)
            total += loss
            _accumulate(grads, d_logits, hidden, matrix, part)
        ctx.grads = grads
        ctx.mark_non_differentiable(best)
        return total, best

    @staticmethod
    def backward(ctx, d_total, _):
        return (*_scaled(ctx.grads, d_total), None, None, None, None)


class LinearLogProbs(torch.autograd.Function):
    """The derivative of the loss by each log-probability is not known yet in the forward pass, so the backward pass
    computes the logits of each chunk again: d log p_target / d logits = (onehot - softmax) / temperature.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.temperature = temperature
        logps = torch.empty(hidden.shape[0], dtype=at_least_float32(hidden.dtype), device=hidden.device)
        matrix, own_bias = in_format_of(hidden, weight, bias)
        for part in _chunks(hidden, weight):
            logits = _scaled_logits(hidden, matrix, own_bias, part, temperature)
            picked = logits.gather(-1, targets[part, None])
            logps[part] = (picked - _exponentials_in_place(logits)[1]).squeeze(-1)
        return logps

    @staticmethod
    def backward(ctx, d_logps):
        hidden, weight, bias, targets = ctx.saved_tensors
        grads = _gradients(ctx, hidden, weight, bias)
        matrix, own_bias = in_format_of(hidden, weight, bias)
        for part in _chunks(hidden, weight):
            logits = _scaled_logits(hidden, matrix, own_bias, part, ctx.temperature)
            _softmax_in_place(logits)
            d_logits = logits.neg_()
            d_logits.scatter_add_(-1, targets[part, None], torch.ones_like(d_logits[:, :1]))
            d_logits *= d_logps[part, None] / ctx.temperature
            _accumulate(grads, d_logits, hidden, matrix, part)
        return (*grads, None, None)


class ChunkedObjective(torch.autograd.Function):
    """The gradient of each chunk is computed in the forward pass, and only scaled in the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, objective, beside):
        grads = _gradients(ctx, hidden, weight, bias)
        needs_none = all(grad is None for grad in grads)
        total = hidden.new_zeros((), dtype=at_least_float32(hidden.dtype))
        matrix, own_bias = in_format_of(hidden, weight, bias)
        at_once = max(1, _by_device(weight, SMALL_OBJECTIVE_ELEMENTS, OBJECTIVE_ELEMENTS) // weight.shape[0])
        for part in _chunks(hidden, weight):
            logits, others = chunk_logits(hidden, matrix, own_bias, part), beside(part)
            for rows in slices(len(logits), at_once):
                place = slice(part.start + rows.start, part.start + rows.stop)
                if needs_none:
                    total += objective(logits[rows], others[rows], place).sum()
                    continue
                own = logits[rows].detach().requires_grad_()
                with torch.enable_grad():
                    loss = objective(own, others[rows], place).sum()
                (d_logits,) = torch.autograd.grad(loss, own)
                logits[rows] = d_logits
                total += loss.detach()
            _accumulate(grads, logits, hidden, matrix, part)
        ctx.grads = grads
        return total

    @staticmethod
    def backward(ctx, d_total):
        return (*_scaled(ctx.grads, d_total), None, None)


def in_format_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """weight and bias with the numbers that they are in the format of `hidden`, once for all chunks."""
    half, dtype = hidden.dtype, format_here(hidden)
    return weight.to(half).to(dtype), None if bias is None else bias.to(half).to(dtype)


def chunk_logits(hidden: Tensor, matrix: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    """(c, V) logits of the positions `part`, in float32 or wider. `matrix` and `bias`: of `in_format_of`."""
    return product(hidden[part], matrix, bias).to(at_least_float32(hidden.dtype))


def _scaled_logits(hidden: Tensor, matrix: Tensor, bias: Tensor | None, part: slice, temperature: float) -> Tensor:
    """As `chunk_logits`, divided by `temperature` in their place."""
    logits = chunk_logits(hidden, matrix, bias, part)
    return logits if temperature == 1 else logits.div_(temperature)


def most_likely(logits: Tensor) -> Tensor:
    """argmax_v of logits (c, V), (c,): the first place of the largest number.

    On a CPU the largest numbers of blocks, and the place in one block of each row, take a fifth of the time that
    `argmax` takes; on a GPU more than twice as long.
    """
    if logits.device.type != "cpu" or logits.shape[-1] % BLOCK:
        return logits.argmax(-1)
    blocks = logits.unflatten(-1, (-1, BLOCK))
    block = blocks.amax(-1).argmax(-1)
    place = blocks[torch.arange(len(block), device=block.device), block].argmax(-1)
    return block * BLOCK + place


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def target_weights(
    logits: Tensor, log_normalizer: Tensor, targets: Tensor, weights: Tensor | None, weigh: Weigh | None
) -> Tensor | None:
    """The weight of each target in the loss, (c,); None if all are 1."""
    if weigh is None:
        return weights
    by_logits = weigh(logits, log_normalizer, targets)
    return by_logits if weights is None else weights * by_logits


def _chunks(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    num_elements = CHUNK_ELEMENTS if weight.requires_grad else _by_device(weight, SMALL_CHUNK_ELEMENTS, CHUNK_ELEMENTS)
    return slices(hidden.shape[0], max(64, num_elements // weight.shape[0]))


def _by_device(weight: Tensor, on_cpu: int, on_others: int) -> int:
    is_on_cpu = weight.device.type == "cpu" or (weight.is_meta and not stands_for_a_gpu(weight))
    return on_cpu if is_on_cpu else on_others


def _gradients(ctx, hidden, weight, bias) -> list[Tensor | None]:
    """Zeros like hidden, weight and bias; None for what needs no gradient."""
    sources = (hidden, weight, bias)
    needs = ctx.needs_input_grad[:3]
    return [
        torch.zeros_like(tensor) if tensor is not None and need else None
        for tensor, need in zip(sources, needs, strict=True)
    ]


def _accumulate(grads: list[Tensor | None], d_logits: Tensor, hidden: Tensor, matrix: Tensor, part: slice) -> None:
    """Add the share of one chunk. d_logits: (c, V); matrix: the weight in the format of `hidden`."""
    if all(grad is None for grad in grads):
        return
    d_logits = d_logits.to(hidden.dtype)
    d_hidden, d_weight, d_bias = grads
    if d_hidden is not None:
        d_hidden[part] = product(d_logits, matrix.T)
    if d_weight is not None:
        d_weight += usual_product(d_logits.T, hidden[part].T).to(d_weight.dtype)
    if d_bias is not None:
        d_bias += d_logits.sum(0).to(d_bias.dtype)


def _scaled(grads: list[Tensor | None], d_total: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(None if grad is None else _times(grad, d_total) for grad in grads)


def _times(grad: Tensor, d_total: Tensor) -> Tensor:
    """grad * d_total in the format of `grad`. A factor of 16 bits would be off by up to 0.4 %, for all alike."""
    if grad.dtype == at_least_float32(grad.dtype):
        return grad * d_total
    scaled = torch.empty_like(grad)
    for out, part in zip(scaled.split(SCALED_ROWS), grad.split(SCALED_ROWS), strict=True):
        out.copy_(part.to(d_total.dtype) * d_total)
    return scaled


def _chunk_loss(
    logits: Tensor, targets: Tensor, label_smoothing: float, weights: Tensor | None, weigh: Weigh | None
) -> tuple[Tensor, Tensor]:
    """The summed cross-entropy of a chunk, and its derivative by the logits, which is computed in their place."""
    picked = logits.gather(-1, targets[:, None])
    mean = logits.mean(-1, keepdim=True) if label_smoothing else None
    counted = weights
    if weigh is not None:
        counted = target_weights(logits, logits.logsumexp(-1, keepdim=True), targets, weights, weigh)
    log_normalizer = _softmax_in_place(logits)
    nll = log_normalizer - picked
    if mean is not None:
        nll = (1 - label_smoothing) * nll + label_smoothing * (log_normalizer - mean)
    loss = nll.sum() if counted is None else (nll.squeeze(-1) * counted).sum()
    d_logits = logits.scatter_add_(-1, targets[:, None], torch.full_like(picked, label_smoothing - 1))
    if label_smoothing:
        d_logits -= label_smoothing / d_logits.shape[-1]
    if counted is not None:
        d_logits *= counted[:, None]
    return loss, d_logits


def _softmax_in_place(logits: Tensor) -> Tensor:
    """Turns logits (c, V) into probabilities. Returns their log-normalizer (c, 1)."""
    total, log_normalizer = _exponentials_in_place(logits)
    logits /= total
    return log_normalizer


def _exponentials_in_place(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Turns logits (c, V) into exp(logits - the largest of each row). Returns their sum and the log-normalizer, (c, 1).

    `logsumexp` would form the exponentials in memory of its own, which is as large as all other memory of a chunk.
    """
    largest = logits.amax(-1, keepdim=True)
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    return total, largest + total.log()
