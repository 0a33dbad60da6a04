"""Reward models: the score of a text is the output of the score layer at its last token.

B sequences, N tokens of a batch, H hidden size. The model is transformers' sequence classifier with one label, so what
is saved loads there as it is. It picks the last token by looking for padding; here every position is scored (N x H
products, next to nothing) and the caller knows where sequences end, so rows can be concatenated without padding.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.model.classes import gives_scores
from luthier.model.modules import unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

SCORE_LAYER = "score"
"""What every decoder of transformers that scores calls its last layer."""
VALUE_HEAD_FILE = "value_head.safetensors"
"""A copy of the score layer under the names that other programs read beside an adapter or a model."""
VALUE_HEAD = "value_head"
"""The layer that is trained together with the policy in ppo (`luthier.model.heads.value_head`)."""
VALUE_HEAD_NAMES = ("v_head.summary.weight", "v_head.summary.bias")


def score_layer(model: "nn.Module") -> "nn.Module":
    """The layer H -> 1 of a reward model, inside its adapters. Raises `ModelError` if it has none."""
    base = unwrap(model)
    if SCORE_LAYER not in dict(base.named_children()):
        raise ModelError(
            f"stage: rm: {type(base).__name__} has no layer that scores every token -> use a model of another"
            " architecture"
        )
    return base.get_submodule(SCORE_LAYER)


def position_scores(model: "nn.Module", inputs: Mapping[str, Any], layer: "nn.Module | None" = None) -> "Tensor":
    """(N,) the score after each token of a batch, float32.

    `model` may be wrapped for distributed training; then `layer` is the `score_layer` of what is in it.
    """
    import torch

    layer = score_layer(model) if layer is None else layer
    caught: list[Tensor] = []
    hook = layer.register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        model(**inputs, use_cache=False)
    finally:
        hook.remove()
    (scores,) = caught
    if scores.shape[:-1] != inputs["input_ids"].shape or scores.shape[-1] != 1:
        raise ModelError(
            f"stage: rm: the score layer of this model gives numbers of the shape {tuple(scores.shape)}, not one for"
            " each token -> use a model with one label, of another architecture"
        )
    return scores.flatten().to(torch.promote_types(scores.dtype, torch.float32))


def fit_scorer(model: "PreTrainedModel", pad_token_id: int) -> None:
    """Set the padding token in the config of a reward model; transformers needs it to find the last token of a text."""
    if gives_scores(model.config):
        model.config.get_text_config().pad_token_id = pad_token_id


def save_value_head(folder: Path, model: "nn.Module", state_dict: Mapping[str, Any] | None = None) -> None:
    """Write `VALUE_HEAD_FILE` if `model` is a reward model or has a value head.

    `state_dict`: the whole weights, where they are sharded.
    """
    from safetensors.torch import save_file

    value_head = dict(model.named_children()).get(VALUE_HEAD)
    if value_head is not None:
        names = [f"{VALUE_HEAD}.{name}" for name in ("weight", "bias")]
        is_gathered = state_dict is not None and names[0] in state_dict
        weight, bias = (state_dict[name] for name in names) if is_gathered else _weights(value_head)  # type: ignore[index]
    elif gives_scores(unwrap(model).config):
        weight, bias = _weights(score_layer(model)) if state_dict is None else _weights_of(state_dict)
    else:
        return
    tensors = (weight, weight.new_zeros(1) if bias is None else bias)
    plain = [tensor.detach().cpu().contiguous().clone() for tensor in tensors]
    save_file(dict(zip(VALUE_HEAD_NAMES, plain, strict=True)), folder / VALUE_HEAD_FILE)


def without_value_head(model: "nn.Module", state_dict: "dict[str, Any] | None") -> "dict[str, Any] | None":
    """The weights of a model that plain transformers knows; None is what it would take by itself."""
    if VALUE_HEAD not in dict(model.named_children()):
        return state_dict
    weights = model.state_dict() if state_dict is None else state_dict
    return {name: weight for name, weight in weights.items() if not name.startswith(f"{VALUE_HEAD}.")}


def _weights(layer: "nn.Module") -> "tuple[Tensor, Tensor | None]":
    """Of the layer, or of its trained copy in the adapter."""
    from peft.utils import ModulesToSaveWrapper

    while isinstance(layer, ModulesToSaveWrapper):
        layer = layer.modules_to_save[layer.active_adapters[0]]
    found: dict[str, Any] = dict(layer.named_parameters())
    return found["weight"], found.get("bias")


def _weights_of(state_dict: Mapping[str, Any]) -> "tuple[Tensor, Tensor | None]":
    named = {name: value for name, value in state_dict.items() if f".{name}".rpartition(f".{SCORE_LAYER}.")[1]}
    learned = {name: value for name, value in named.items() if "modules_to_save" in name} or named
    by_kind = {name.rpartition(".")[2]: value for name, value in learned.items()}
    return by_kind["weight"], by_kind.get("bias")
