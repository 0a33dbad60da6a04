"""The parameters of a model, counted and listed."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from luthier.core.errors import ModelError
from luthier.core.log import info
from luthier.model.multimodal import frozen_parts
from luthier.model.quantization._layers import num_weights, quantized_layers

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from luthier.config.keys.finetuning import FinetuningConfig


def count_parameters(model: "nn.Module") -> tuple[int, int]:
    """(trainable, all); a tied weight counts once."""
    packed = {id(weight): 0 for _, layer in quantized_layers(model) for weight in layer.parameters(recurse=False)}
    sizes = [(packed.get(id(weight), weight.numel()), weight.requires_grad) for weight in model.parameters()]
    num_low_bit = sum(num_weights(layer) for _, layer in quantized_layers(model))
    return sum(size for size, is_trained in sizes if is_trained), num_low_bit + sum(size for size, _ in sizes)


def describe_parameters(model: "nn.Module") -> Iterator[str]:
    """One line per parameter, for `print_param_status`."""
    for name, weight in model.named_parameters():
        state = "trainable" if weight.requires_grad else "frozen"
        yield f"{name}: {tuple(weight.shape)} {str(weight.dtype).removeprefix('torch.')} on {weight.device}, {state}"


def report_parameters(model: "nn.Module", *, one_by_one: bool) -> tuple[int, int]:
    """Log how many are trainable, and each parameter with `one_by_one`. Returns (trainable, all).

    Raises `ModelError` if none is trainable.
    """
    trainable, total = count_parameters(model)
    if not trainable:
        raise ModelError(
            "finetuning_type: with these keys no parameter is trainable"
            " -> choose other layers or modules, or another size of the adapter"
        )
    info(f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.4%})")
    for line in describe_parameters(model) if one_by_one else ():
        info(line)
    return trainable, total


def parts_to_freeze(base: "PreTrainedModel", keys: "FinetuningConfig", *, sees: bool) -> tuple[str, ...]:
    """Names of what the freeze keys freeze, and of what gets no gradient; a log line names them.

    `sees`: whether rows have images.
    """
    keeps_tower, keeps_projector = keys.freeze_vision_tower, keys.freeze_multi_modal_projector
    frozen = frozen_parts(
        base,
        freeze_vision_tower=keeps_tower or not sees,
        freeze_multi_modal_projector=keeps_projector or not sees,
        freeze_language_model=keys.freeze_language_model,
    )
    if frozen:
        blind = "" if sees or (keeps_tower and keeps_projector) else " (no dataset of this run has images)"
        info(f"frozen parts: {', '.join(frozen)}{blind}")
    return frozen
