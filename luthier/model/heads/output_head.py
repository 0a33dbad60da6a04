"""From hidden states to the loss at the labeled positions, without ever holding the logits of all positions.

B rows, T tokens, K labeled positions, H hidden size, V vocabulary.

The logits of a batch are its largest tensor: (B, T, V) in float32 is 800 MB for 4 x 1024 tokens and 50,000 words, and
most of it belongs to prompt tokens, which have no label. So the head runs on the K labeled positions only, in chunks,
and the gradient of each chunk is computed while its logits exist.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.model.attention_kernels import attending_anywhere
from luthier.model.classes import gives_scores
from luthier.model.dtype import autocast_of_training, computed_in
from luthier.model.heads.router_loss import RouterLoss, listen_to_router
from luthier.model.heads.score_head import score_layer
from luthier.model.modules import unwrap
from luthier.model.tensor_parallel import whole

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from luthier.model.kernels.chunked_head import Weigh


@dataclass(frozen=True, slots=True)
class OutputHead:
    """How the logits of a model come out of its hidden states."""

    linear: "nn.Linear | None"
    """The head if logits are exactly its output; None if the model does more (soft caps, scales, adapters)."""
    takes_positions: bool
    """Whether `forward` takes `logits_to_keep`, so that positions without a label can be left out."""
    score: "nn.Module | None" = None
    """The layer that scores every token, if the model is a reward model."""
    value: "nn.Module | None" = None
    """The value head, if the policy has one."""
    router: RouterLoss | None = None
    """The balance loss of experts (`moe_aux_loss_coef`), if requested."""


def inspect_head(model: "nn.Module", moe_aux_loss_coef: float | None = None) -> OutputHead:
    """Found by a trial: the logits of two tokens are compared with the head applied to its own input.

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
    with torch.no_grad(), autocast_of_training(base), attending_anywhere(base):
        logits = model(input_ids=ids, use_cache=False).logits
        with hidden_instead_of_logits(linear):
            hidden = model(input_ids=ids, use_cache=False).logits
        is_plain = hidden.shape[-1] == linear.in_features and torch.equal(linear(hidden), logits)
    model.train(was_training)
    return OutputHead(linear if is_plain else None, _keeps_positions(model), router=router)


def _keeps_positions(model: "nn.Module") -> bool:
    """Whether `forward` accepts a list of positions as `logits_to_keep`. That of unsloth does not."""
    import torch

    base, was_training = unwrap(model), model.training
    ids = torch.tensor([[0, 1]], device=base.device)
    model.eval()
    with torch.no_grad(), autocast_of_training(base), attending_anywhere(base):
        kept = model(input_ids=ids, use_cache=False, logits_to_keep=torch.tensor([1], device=ids.device)).logits
    model.train(was_training)
    return bool(kept.shape[1] == 1)


@contextmanager
def hidden_instead_of_logits(linear: "nn.Linear") -> "Iterator[list[torch.dtype]]":
    """While open, the head is the identity, so the model returns hidden states instead of logits.

    The list is told which format the head would have computed in: what wraps a model for autocast (accelerate) turns
    all that the model returns into float32.
    """
    usual = vars(linear).get("forward")  # that of a layer whose weights are shared by processes is its own
    formats: list[torch.dtype] = []

    def identity(input: "Tensor") -> "Tensor":
        formats.append(computed_in(input))
        return input

    linear.forward = identity  # type: ignore[method-assign]
    try:
        yield formats
    finally:
        if usual is None:
            del linear.forward
        else:
            linear.forward = usual  # type: ignore[method-assign]


def summed_loss(
    model: "nn.Module",
    head: OutputHead,
    inputs: Mapping[str, Any],
    positions: "Tensor",
    targets: "Tensor",
    *,
    label_smoothing: float = 0.0,
    weights: "Tensor | None" = None,
    weigh: "Weigh | None" = None,
) -> "tuple[Tensor, Tensor]":
    """Cross-entropy summed over the labeled positions, and the most likely tokens there.

    inputs: what `forward` takes (input_ids of shape (B, T), masks, position ids).
    positions: (K,) indices into the flattened B x T positions whose next token has a label.
    targets: (K,) the token ids to be predicted there.
    label_smoothing: share of a target spread evenly over the vocabulary (https://arxiv.org/abs/1512.00567, sec. 7).
    weights: (K,) how much each target counts; all 1 if not given.
    weigh: what else each target counts by, from the model's own logits.

    Returns the scalar sum and the (K,) most likely ids.
    """
    import torch.nn.functional as F

    from luthier.model.kernels.chunked_head import linear_cross_entropy, target_weights

    if head.linear is not None:
        hidden = hidden_at(model, head, inputs, positions)
        weight, bias = whole(head.linear.weight), whole(head.linear.bias)
        return linear_cross_entropy(hidden, weight, bias, targets, label_smoothing, weights=weights, weigh=weigh)
    logits = logits_at(model, head, inputs, positions)
    if logits.element_size() < 4:
        logits = logits.float()
    loss = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
    counted = target_weights(logits.detach(), logits.detach().logsumexp(-1, keepdim=True), targets, weights, weigh)
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
    """log p(target) at the labeled positions, (K,) with gradients, and the mean logit there, (K,) without.

    inputs, positions and targets as in `summed_loss`; logits are divided by `temperature`.
    """
    import torch

    from luthier.model.kernels.chunked_head import linear_logps

    if head.linear is not None:
        hidden = hidden_at(model, head, inputs, positions)
        weight, bias = head.linear.weight, head.linear.bias
        logps = linear_logps(hidden, weight, bias, targets, temperature)
        # mean_v (h . W_v + b_v) = h . mean_v W_v + mean_v b_v
        mean = hidden.detach().float() @ weight.detach().mean(0, dtype=torch.float32)
        return logps, mean if bias is None else mean + bias.detach().float().mean()
    logits = logits_at(model, head, inputs, positions)
    if logits.element_size() < 4:
        logits = logits.float()
    logps = (logits / temperature).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return logps, logits.detach().mean(-1)


def hidden_at(model: "nn.Module", head: OutputHead, inputs: Mapping[str, Any], positions: "Tensor") -> "Tensor":
    """(K, H) hidden states at `positions`, of a model whose logits are exactly the output of a linear head.

    In the format that the head computes in, so a bf16 run has its largest products in bf16, as with plain autocast.
    """
    import torch

    assert head.linear is not None, "without a linear head there are only logits"
    with hidden_instead_of_logits(head.linear) as formats:
        hidden = logits_at(model, head, inputs, positions)
    # In float16 the gradients of a loss that is not yet scaled would vanish.
    return hidden.to(torch.bfloat16) if formats[-1:] == [torch.bfloat16] else hidden


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
