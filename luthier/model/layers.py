"""The blocks of a model, found from its structure."""

from typing import TYPE_CHECKING

from luthier.core.errors import ModelError
from luthier.core.log import warn
from luthier.model.multimodal import find_parts, in_parts

if TYPE_CHECKING:
    from torch.nn import ModuleList
    from transformers import PreTrainedModel


def layer_list(model: "PreTrainedModel") -> "tuple[str, ModuleList]":
    """The blocks of the language model: the list of modules that is as long as its config says, and its name."""
    from torch.nn import ModuleList

    towers = find_parts(model).towers
    num_layers = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, ModuleList) and len(module) == num_layers and not in_parts(name, towers):
            return name, module
    raise ModelError(f"{type(model).__name__} has no list of {num_layers} layers to choose from")


def layers_to_train(num_layers: int, wanted: int) -> range:
    """The last `wanted` layers, or the first -`wanted`."""
    if abs(wanted) > num_layers:
        warn(f"freeze_trainable_layers: {wanted}: this model has {num_layers} layers, and all of them learn")
    return range(max(0, num_layers - wanted), num_layers) if wanted > 0 else range(min(-wanted, num_layers))


def inserted_layers(num_layers: int, num_blocks: int) -> range:
    """The places of `num_blocks` blocks that an expansion spread evenly over a model that now has `num_layers`.

    Raises `ModelError` if they cannot be spread so.
    """
    if num_blocks < 1 or num_layers % num_blocks or num_layers == num_blocks:
        raise ModelError(
            f"use_llama_pro: freeze_trainable_layers: {num_blocks}: this model has {num_layers} layers, which are not"
            f" {num_blocks} equal groups with an inserted block at the end of each -> give the number of blocks that"
            " `luthier expand` inserted"
        )
    group = num_layers // num_blocks
    return range(group - 1, num_layers, group)


def inserted_blocks(model: "PreTrainedModel", num_blocks: int) -> list[str]:
    """The full names of the blocks that an expansion inserted. Raises `ModelError` as `inserted_layers` does."""
    name, layers = layer_list(model)
    return [f"{name}.{index}" for index in inserted_layers(len(layers), num_blocks)]
