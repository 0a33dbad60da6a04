"""Modules by name: users write `q_proj`, the model has `model.layers.0.self_attn.q_proj`."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.core.importing import is_loaded
from luthier.core.registry import did_you_mean
from luthier.model.classes import CACHE_NAMES
from luthier.model.multimodal import find_parts, in_parts

if TYPE_CHECKING:
    from torch import nn
    from torch.nn import ModuleList
    from transformers import PreTrainedModel


def require_modules(
    model: "nn.Module", wanted: Sequence[str], key: str, *, also: Sequence[str] = ()
) -> tuple[str, ...]:
    """`wanted` as it is, if each is the end of some module's name. Raises `ModelError` with the names there are.

    `also`: names of weights that could have been given as well.
    """
    names = [name for name, _ in model.named_modules() if name]
    last = {name.rpartition(".")[2] for name in names}
    for word in wanted:
        if word not in last and not any(name == word or name.endswith(f".{word}") for name in names):
            with_weights = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
            raise unknown_module(word, (*(name.rpartition(".")[2] for name in with_weights), *also), key)
    return tuple(wanted)


def unknown_module(word: str, names: Iterable[str], key: str) -> ModelError:
    known = sorted({name for name in names if name and not name.isdecimal()})
    hint = did_you_mean(word, known, repr)
    hint = f"; {hint}" if hint else ""
    return ModelError(f"{key}: no module of this model is called {word!r}{hint} (it has {', '.join(known)})")


def unwrap(model: Any) -> "PreTrainedModel":
    """The transformers model itself, inside its adapters."""
    base: Any = model
    if is_loaded("peft"):  # else it has made no adapter
        from peft import PeftModel

        base = model.get_base_model() if isinstance(model, PeftModel) else model
    return base


def cache_name(model: Any) -> str | None:
    """What the forward pass calls the keys and values of earlier tokens; None if it takes none."""
    parameters = forward_parameters(model)
    return next((name for name in CACHE_NAMES if name in parameters), None)


def forward_parameters(model: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of the forward pass of the model inside its adapters."""
    return inspect.signature(unwrap(model).forward).parameters


def expert_parameters(model: "nn.Module") -> Iterator[str]:
    """The full names of parameters that stack one matrix per expert."""
    from torch.nn.modules.conv import _ConvNd

    for owner, module in model.named_modules():
        if not isinstance(module, _ConvNd):
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim == 3 and weight.is_floating_point():  # not the codes of AQLM
                    yield f"{owner}.{name}"


def linear_layers(model: "nn.Module") -> "Iterator[tuple[str, nn.Module]]":
    """Full name and module of everything that computes x W^T + b and no more, quantized or not."""
    import torch
    from transformers.pytorch_utils import Conv1D

    for name, module in model.named_modules():
        kind = type(module)
        if kind.forward in (torch.nn.Linear.forward, Conv1D.forward):
            yield name, module
        elif "Linear" in kind.__name__ and {"in_features", "out_features"} <= set(vars(module)):
            yield name, module  # of a quantization library, or a model's own that computes the same


def layer_list(model: "PreTrainedModel") -> "tuple[str, ModuleList]":
    """The blocks of the language model: the list of modules that is as long as its config says, and its name."""
    from torch.nn import ModuleList

    encoders = find_parts(model).encoders
    num_layers = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, ModuleList) and len(module) == num_layers and not in_parts(name, encoders):
            return name, module
    raise ModelError(f"{type(model).__name__} has no list of {num_layers} layers to choose from")
