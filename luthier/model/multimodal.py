"""The parts of a multimodal model: encoders that turn images, videos and audio into vectors, a projector, and the
language model.

The part of a weight is found from the structure of the model, not from its name:

- an encoder is built from one of the config's vision or audio configs;
- the language model is built from its text config, and includes the output head;
- the projector is everything else, and what merges patches at the end of an encoder (`...Merger`).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

_SENSES = re.compile("vision|audio|speech|image|video")
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""How attention kernels call the boundaries of the samples of a row."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Names of modules and of single weights; together they hold every weight of the model once."""

    encoders: tuple[str, ...] = ()
    projector: tuple[str, ...] = ()
    language: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether the model is multimodal."""
        return bool(self.encoders or self.projector)


def find_parts(model: "PreTrainedModel") -> Parts:
    """The parts of `model`; empty ones for a text model."""
    config = model.config
    text = config.get_text_config()
    senses = {type(sub) for name, sub in _sub_configs(config) if _SENSES.search(name)}
    if not senses or type(text) in senses:
        return Parts()
    encoders = tuple(_topmost(model, senses, type(config)))
    has_own_text = text is not config
    language = tuple(_topmost(model, {type(text)}, type(config))) if has_own_text else ()
    head = model.get_output_embeddings()
    language += tuple(name for name, module in model.named_modules() if module is head and not in_parts(name, language))
    mergers = tuple(name for encoder in encoders for name in _mergers(model.get_submodule(encoder), encoder))
    encoders = tuple(part for encoder in encoders for part in _without(model.get_submodule(encoder), encoder, mergers))
    rest = tuple(_without(model, "", (*encoders, *mergers, *language)))
    return (
        Parts(encoders, (*mergers, *rest), language) if has_own_text else Parts(encoders, mergers, (*language, *rest))
    )


def text_part(base: "PreTrainedModel") -> "PreTrainedModel":
    """The language model inside `base`; `base` itself if it is one."""
    from transformers import PreTrainedModel

    text = base.config.get_text_config()
    if text is base.config:
        return base
    return next((part for part in base.modules() if isinstance(part, PreTrainedModel) and part.config is text), base)


def blind_to_bounds(base: "PreTrainedModel") -> None:
    """Keep from the encoders of `base` where samples begin in a row of text: their kernels would cut there, too."""
    for name in find_parts(base).encoders:
        encoder = base.get_submodule(name)
        if not any(hook is _without_bounds for hook in encoder._forward_pre_hooks.values()):
            encoder.register_forward_pre_hook(_without_bounds, with_kwargs=True)


def _without_bounds(encoder: "nn.Module", args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, {name: value for name, value in given.items() if name not in BOUNDS}


def _sub_configs(config: "PreTrainedConfig") -> "Iterator[tuple[str, PreTrainedConfig]]":
    for name in config.sub_configs:
        sub = getattr(config, name, None)
        if sub is not None:
            yield name, sub


def _topmost(model: "nn.Module", configs: set[type], whole: type) -> Iterator[str]:
    """Names of the outermost modules that are built from one of `configs`."""
    found: list[str] = []
    for name, module in model.named_modules():
        kind = type(getattr(module, "config", None))
        if name and kind in configs and kind is not whole and not in_parts(name, found):
            found.append(name)
            yield name


def _mergers(encoder: "nn.Module", name: str) -> Iterator[str]:
    from torch.nn import ModuleList

    for child_name, child in encoder.named_children():
        kinds = child if isinstance(child, ModuleList) else [child]
        if len(kinds) and all("Merger" in type(module).__name__ for module in kinds):
            yield f"{name}.{child_name}"


def _without(module: "nn.Module", name: str, others: tuple[str, ...]) -> Iterator[str]:
    """The largest modules, and single weights, that hold all of `module` but `others`."""
    if name in others:
        return
    if name and not any(other.startswith(f"{name}.") for other in others):
        if next(module.parameters(), None) is not None:
            yield name
        return
    prefix = f"{name}." if name else ""
    yield from (prefix + weight for weight, _ in module.named_parameters(recurse=False))
    for child_name, child in module.named_children():
        yield from _without(child, prefix + child_name, others)


def frozen_parts(
    model: "PreTrainedModel",
    *,
    freeze_vision_tower: bool,
    freeze_multi_modal_projector: bool,
    freeze_language_model: bool,
) -> tuple[str, ...]:
    """Names of the modules and weights that the three keys freeze."""
    parts = find_parts(model)
    chosen = (
        (freeze_vision_tower, parts.encoders),
        (freeze_multi_modal_projector, parts.projector),
        (freeze_language_model, parts.language),
    )
    return tuple(name for is_frozen, names in chosen if is_frozen for name in names)


def freeze_parts(model: "nn.Module", frozen: Sequence[str]) -> None:
    """Raises `ModelError` if no trainable parameter is left."""
    for name, weight in model.named_parameters():
        if in_parts(name, frozen):
            weight.requires_grad_(False)
    if not any(weight.requires_grad for weight in model.parameters()):
        raise ModelError(
            "freeze_vision_tower, freeze_multi_modal_projector and freeze_language_model together leave no trainable "
            "parameter -> set one of them to false"
        )


def in_parts(name: str, parts: Sequence[str]) -> bool:
    """Whether the module or weight `name` belongs to one of `parts`."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)
