"""From hidden states to the loss at the labelled positions, without ever holding the logits of all positions.

B rows, T tokens, K labelled positions, H hidden size, V vocabulary.

The logits of a batch are its largest tensor: (B, T, V) in float32 is 800 MB for 4 x 1024 tokens and 50,000 words, and
most of it belongs to prompt tokens that nobody learns. So the head runs on the K labelled positions only, in chunks,
and each chunk's gradient is taken at once, while its logits are still there.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.model.adapters._merge import unwrap
from luthier.model.classes import gives_scores
from luthier.model.dtype import autocast_of_training
from luthier.model.features.router_balance import RouterLoss, listen_to_router
from luthier.model.heads.score_head import score_layer

if TYPE_CHECKING:
    from torch import Tensor, nn

CHUNK_ELEMENTS = 2**26
"""Logits held at a time: 64 Mi numbers, 256 MB in float32."""


Weigh = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]
"""(logits (K, V), their log-normalizer (K, 1), targets (K,)) -> how much each target counts, (K,)."""


@dataclass(frozen=True, slots=True)
class OutputHead:
    """How the logits of a model come out of its hidden states."""

    linear: "nn.Linear | None"
    """The head if logits are exactly its output; None if the model does more (soft caps, scales, adapters)."""
    takes_positions: bool
    """Whether `forward` knows `logits_to_keep` and so can leave out the positions nobody learns."""
    score: "nn.Module | None" = None
    """The layer that scores every token, if the model is a reward model."""
    value: "nn.Module | None" = None
    """The layer that says what the rest of an answer is worth, if the policy learns that."""
    router: RouterLoss | None = None
    """What balances the experts (`moe_aux_loss_coef`), if that is asked for."""


def inspect_head(model: "nn.Module", moe_aux_loss_coef: float | None = None) -> OutputHead:
    """Find out by trying: the logits of two tokens are compared with the head applied to what the model fed it.

    `model` is the bare model or a peft model, not yet wrapped for distributed training.
    Raises `ModelError` if a router loss is asked of a model that has none.
    """
    import torch

    base = unwrap(model)
    if gives_scores(base.config):
        return OutputHead(None, takes_positions=False, score=score_layer(model))
    router = None if moe_aux_loss_coef is None else listen_to_router(model, moe_aux_loss_coef)
    takes_positions = "logits_to_keep" in inspect.signature(base.forward).parameters
    linear = base.get_output_embeddings()
    if not takes_positions or type(linear) is not torch.nn.Linear:
        return OutputHead(None, takes_positions and _keeps_positions(model), router=router)
    was_training = model.training
    model.eval()
    ids = torch.tensor([[0, 1]], device=linear.weight.device)
    with torch.no_grad(), autocast_of_training(base):
        logits = model(input_ids=ids, use_cache=False).logits
        with hidden_instead_of_logits(linear):
            hidden = model(input_ids=ids, use_cache=False).logits
        is_plain = hidden.shape[-1] == linear.in_features and torch.equal(linear(hidden), logits)
    model.train(was_training)
    return OutputHead(linear if is_plain else None, _keeps_positions(model), router=router)


def _keeps_positions(model: "nn.Module") -> bool:
    """Whether `logits_to_keep` is obeyed where it is a list of positions. What unsloth puts in its place does not."""
    import torch

    base, was_training = unwrap(model), model.training
    ids = torch.tensor([[0, 1]], device=base.device)
    model.eval()
    with torch.no_grad(), autocast_of_training(base):
        kept = model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor([1], device=ids.device)).logits
    model.train(was_training)
    return bool(kept.shape[1] == 1)


@contextmanager
def hidden_instead_of_logits(linear: "nn.Linear") -> Iterator[None]:
    """While open, the head hands its input through, so the model returns hidden states where it returns logits."""
    linear.forward = lambda input: input  # type: ignore[method-assign]
    try:
        yield
    finally:
        del linear.forward


def summed_loss(
    model: "nn.Module",
    head: OutputHead,
    inputs: Mapping[str, Any],
    positions: "Tensor",
    targets: "Tensor",
    *,
    label_smoothing: float = 0.0,
    weights: "Tensor | None" = None,
    weigh: Weigh | None = None,
) -> "tuple[Tensor, Tensor]":
    """Cross-entropy summed over the labelled positions, and the most likely tokens there.

    inputs: what `forward` takes (input_ids of shape (B, T), masks, position ids).
    positions: (K,) indices into the flattened B x T positions whose next token is learned.
    targets: (K,) the token ids to be predicted there.
    label_smoothing: share of a target spread evenly over the vocabulary (https://arxiv.org/abs/1512.00567, sec. 7).
    weights: (K,) how much each target counts; all 1 if not given.
    weigh: what else each target counts by, from the model's own logits.

    Returns the scalar sum and the (K,) most likely ids.
    """
    import torch.nn.functional as F

    if head.linear is not None:
        hidden = hidden_at(model, head, inputs, positions)
        return linear_cross_entropy(
            hidden, head.linear.weight, head.linear.bias, targets, label_smoothing, weights=weights, weigh=weigh
        )
    logits = logits_at(model, head, inputs, positions)
    if logits.element_size() < 4:
        logits = logits.float()
    loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    counted = _counted(logits.detach(), logits.detach().logsumexp(-1, keepdim=True), targets, weights, weigh)
    return (loss if counted is None else loss * counted).sum(), logits.detach().argmax(-1)


def token_logps(
    model: "nn.Module",
    head: OutputHead,
    inputs: Mapping[str, Any],
    positions: "Tensor",
    targets: "Tensor",
    *,
    temperature: float = 1.0,
) -> "tuple[Tensor, Tensor]":
    """log p(target) at the labelled positions, (K,) with gradients, and the mean logit there, (K,) without.

    inputs, positions and targets as in `summed_loss`; logits are divided by `temperature`.
    """
    if head.linear is not None:
        hidden = hidden_at(model, head, inputs, positions)
        weight, bias = head.linear.weight, head.linear.bias
        logps = linear_logps(hidden, weight, bias, targets, temperature)
        # mean_v (h . W_v + b_v) = h . mean_v W_v + mean_v b_v
        mean = hidden.detach().float() @ weight.detach().float().mean(0)
        return logps, mean if bias is None else mean + bias.detach().float().mean()
    logits = logits_at(model, head, inputs, positions)
    if logits.element_size() < 4:
        logits = logits.float()
    logps = (logits / temperature).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return logps, logits.detach().mean(-1)


def hidden_at(model: "nn.Module", head: OutputHead, inputs: Mapping[str, Any], positions: "Tensor") -> "Tensor":
    """(K, H) hidden states at `positions`, of a model whose logits are exactly the output of a linear head."""
    assert head.linear is not None, "without a linear head there are only logits"
    with hidden_instead_of_logits(head.linear):
        return logits_at(model, head, inputs, positions)


def logits_at(model: "nn.Module", head: OutputHead, inputs: Mapping[str, Any], positions: "Tensor") -> "Tensor":
    """(K, V) logits at `positions`."""
    num_rows, num_tokens = inputs["input_ids"].shape
    if not head.takes_positions:
        return model(**inputs, use_cache=False).logits.flatten(0, 1)[positions]
    if num_rows == 1:
        return model(**inputs, use_cache=False, logits_to_keep=positions).logits[0]
    # Several rows share one list of columns: those that any row needs.
    columns, column_index = (positions % num_tokens).unique(return_inverse=True)
    kept = model(**inputs, use_cache=False, logits_to_keep=columns).logits
    return kept[positions // num_tokens, column_index]


def linear_cross_entropy(
    hidden: "Tensor",
    weight: "Tensor",
    bias: "Tensor | None",
    targets: "Tensor",
    label_smoothing: float = 0.0,
    *,
    weights: "Tensor | None" = None,
    weigh: Weigh | None = None,
) -> "tuple[Tensor, Tensor]":
    """sum_k w_k CE(hidden_k W^T + b, target_k) with logits of one chunk of positions in memory at a time.

    hidden: (K, H); weight: (V, H); bias: (V,) or None; targets: (K,). Returns the sum and the (K,) most likely ids.
    With p = softmax(logits) and q the (smoothed) target distribution, d loss / d logits = w (p - q), so the gradients
    of hidden, weight and bias are known chunk by chunk in the forward pass and only scaled in the backward pass.
    w is the product of `weights` and what `weigh` gives, 1 without them; no gradient goes through it.
    """
    import torch

    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, bias):
            needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], bias is not None and ctx.needs_input_grad[2]]
            grads = [
                torch.zeros_like(t) if need else None for t, need in zip((hidden, weight, bias), needs, strict=True)
            ]
            matrix = weight.to(hidden.dtype)
            total = torch.zeros((), dtype=_at_least_float32(hidden.dtype), device=hidden.device)
            best = torch.empty_like(targets)
            size = max(64, CHUNK_ELEMENTS // weight.shape[0])
            for start in range(0, hidden.shape[0], size):
                part = slice(start, start + size)
                logits = torch.nn.functional.linear(
                    hidden[part], matrix, None if bias is None else bias.to(hidden.dtype)
                )
                own = None if weights is None else weights[part]
                best[part] = logits.argmax(-1)
                loss, d_logits = _chunk_loss(logits.to(total.dtype), targets[part], label_smoothing, own, weigh)
                total += loss
                if not any(needs):
                    continue
                d_logits = d_logits.to(hidden.dtype)
                if grads[0] is not None:
                    grads[0][part] = d_logits @ matrix
                if grads[1] is not None:
                    grads[1] += (d_logits.T @ hidden[part]).to(grads[1].dtype)
                if grads[2] is not None:
                    grads[2] += d_logits.sum(0).to(grads[2].dtype)
            ctx.grads = grads
            ctx.mark_non_differentiable(best)
            return total, best

        @staticmethod
        def backward(ctx, d_total, _):
            return tuple(None if grad is None else grad * d_total.to(grad.dtype) for grad in ctx.grads)

    return LinearCrossEntropy.apply(hidden, weight, bias)


def _chunk_loss(
    logits: "Tensor", targets: "Tensor", label_smoothing: float, weights: "Tensor | None", weigh: Weigh | None
) -> "tuple[Tensor, Tensor]":
    """The summed cross-entropy of a chunk, and its derivative by the logits, in whose place it is computed."""
    import torch

    log_normalizer = logits.logsumexp(-1, keepdim=True)
    picked = logits.gather(-1, targets[:, None])
    nll = log_normalizer - picked
    if label_smoothing:
        even = log_normalizer - logits.mean(-1, keepdim=True)
        nll = (1 - label_smoothing) * nll + label_smoothing * even
    counted = _counted(logits, log_normalizer, targets, weights, weigh)
    loss = nll.sum() if counted is None else (nll.squeeze(-1) * counted).sum()
    d_logits = logits.sub_(log_normalizer).exp_()
    d_logits.scatter_add_(-1, targets[:, None], torch.full_like(picked, label_smoothing - 1))
    if label_smoothing:
        d_logits -= label_smoothing / d_logits.shape[-1]
    if counted is not None:
        d_logits *= counted[:, None]
    return loss, d_logits


def _counted(
    logits: "Tensor", log_normalizer: "Tensor", targets: "Tensor", weights: "Tensor | None", weigh: Weigh | None
) -> "Tensor | None":
    """How much each target counts, (K,); None if all count in full."""
    if weigh is None:
        return weights
    by_logits = weigh(logits, log_normalizer, targets)
    return by_logits if weights is None else weights * by_logits


def linear_logps(
    hidden: "Tensor", weight: "Tensor", bias: "Tensor | None", targets: "Tensor", temperature: float = 1.0
) -> "Tensor":
    """log softmax((hidden_k W^T + b) / temperature)[target_k], with logits of one chunk of positions at a time.

    hidden: (K, H); weight: (V, H); bias: (V,) or None; targets: (K,). Returns (K,). What the loss makes of each number
    is not known yet, so the backward pass computes the logits of each chunk once more:
    d log p_target / d logits = (onehot - softmax) / temperature.
    """
    import torch

    dtype = _at_least_float32(hidden.dtype)
    size = max(64, CHUNK_ELEMENTS // weight.shape[0])
    chunks = [slice(start, start + size) for start in range(0, hidden.shape[0], size)]

    def scaled_logits(hidden: "Tensor", weight: "Tensor", bias: "Tensor | None") -> "Tensor":
        own_bias = None if bias is None else bias.to(hidden.dtype)
        return torch.nn.functional.linear(hidden, weight.to(hidden.dtype), own_bias).to(dtype) / temperature

    class LinearLogProbs(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight, bias):
            ctx.save_for_backward(hidden, weight, bias)
            logps = torch.empty(hidden.shape[0], dtype=dtype, device=hidden.device)
            for part in chunks:
                logits = scaled_logits(hidden[part], weight, bias)
                logps[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - logits.logsumexp(-1)
            return logps

        @staticmethod
        def backward(ctx, d_logps):
            hidden, weight, bias = ctx.saved_tensors
            needs = ctx.needs_input_grad
            d_hidden = torch.zeros_like(hidden) if needs[0] else None
            d_weight = torch.zeros_like(weight) if needs[1] else None
            d_bias = torch.zeros_like(bias) if needs[2] else None
            for part in chunks:
                d_logits = scaled_logits(hidden[part], weight, bias).softmax(-1).neg_()
                d_logits.scatter_add_(-1, targets[part, None], torch.ones_like(d_logits[:, :1]))
                d_logits = (d_logits * (d_logps[part, None] / temperature)).to(hidden.dtype)
                if d_hidden is not None:
                    d_hidden[part] = d_logits @ weight.to(hidden.dtype)
                if d_weight is not None:
                    d_weight += (d_logits.T @ hidden[part]).to(weight.dtype)
                if d_bias is not None:
                    d_bias += d_logits.sum(0).to(bias.dtype)
            return d_hidden, d_weight, d_bias

    logps: Tensor = LinearLogProbs.apply(hidden, weight, bias)
    return logps


def _at_least_float32(dtype):
    import torch

    return torch.promote_types(dtype, torch.float32)
