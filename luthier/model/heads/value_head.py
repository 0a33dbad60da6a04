"""The value head of ppo: the expected return of an answer, from the hidden state at each token.

A linear layer H -> 1 on the input of the output head. It starts at 0, is trained together with the policy and is saved
separately, so that other libraries can load the model and the adapter. K positions, H hidden size.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.model.heads.output_head import OutputHead, hidden_at, logits_at
from luthier.model.heads.score_head import VALUE_HEAD, VALUE_HEAD_FILE, VALUE_HEAD_NAMES
from luthier.model.modules import unwrap
from luthier.model.sharded import exchange, is_sharded, reshard

if TYPE_CHECKING:
    from torch import Tensor, nn


def add_value_head(model: "nn.Module") -> "nn.Module":
    """A fresh value head on `model`, which may carry an adapter. Returns the layer."""
    import torch

    width: int = unwrap(model).config.get_text_config().hidden_size
    layer = torch.nn.Linear(width, 1, device=next(model.parameters()).device, dtype=torch.float32)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    model.add_module(VALUE_HEAD, layer)
    return layer


def load_value_head(model: "nn.Module", folder: Path) -> None:
    """The value head that a checkpoint holds. Raises `ModelError` if it has none."""
    import torch
    from safetensors.torch import load_file

    path = folder / VALUE_HEAD_FILE
    if not path.is_file():
        raise ModelError(f"{path}: the value head is missing -> choose a checkpoint of a run of stage: ppo")
    tensors, layer = load_file(path), model.get_submodule(VALUE_HEAD)
    are_shards = is_sharded(model)
    reshard(model)
    with torch.no_grad():
        for name, parameter in zip(VALUE_HEAD_NAMES, layer.parameters(), strict=True):
            if are_shards:
                exchange(parameter, tensors[name])
            else:
                parameter.copy_(tensors[name])


def logps_and_values(
    model: "nn.Module",
    head: OutputHead,
    inputs: Mapping[str, Any],
    positions: "Tensor",
    targets: "Tensor",
    *,
    temperature: float,
) -> "tuple[Tensor, Tensor]":
    """(K,) log p(target), as `token_logps` gives it, and (K,) values, both with gradients and from one pass."""
    from luthier.model.kernels.chunked_head import linear_logps

    assert head.value is not None, "the policy has a value head"
    if head.linear is not None:
        hidden = hidden_at(model, head, inputs, positions)
        logps = linear_logps(hidden, head.linear.weight, head.linear.bias, targets, temperature)
        return logps, head.value(hidden.float()).squeeze(-1)
    caught: list[Tensor] = []
    output: Any = unwrap(model).get_output_embeddings()
    hook = output.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    answer_again: Any = lambda **kwargs: _Caught(caught[0])  # noqa: E731
    try:
        logits = logits_at(model, head, inputs, positions)
        hidden = logits_at(answer_again, head, inputs, positions)
    finally:
        hook.remove()
    logps = (logits.float() / temperature).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    return logps, head.value(hidden.float()).squeeze(-1)


class _Caught:
    """The input of the output head, instead of the logits."""

    def __init__(self, logits: "Tensor") -> None:
        self.logits = logits
