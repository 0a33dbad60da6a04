"""Which weights of a model get an adapter: `lora_target`, found from the modules that the model has.

A linear layer is a module of its own. The experts of a mixture are not: transformers keeps those of a layer as one
parameter of shape (experts, out, in) or (experts, in, out), which peft adapts by name as a "target parameter".
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.core.errors import ModelError
from luthier.model.heads.score_head import SCORE_LAYER
from luthier.model.modules import expert_parameters, linear_layers, require_modules
from luthier.model.multimodal import find_parts, in_parts

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Targets:
    """Suffixes of names, as peft takes them."""

    modules: tuple[str, ...] = ()
    """Layers."""
    parameters: tuple[str, ...] = ()
    """Weights that are named one by one: stacked experts, and layers that peft would take for something else."""


def find_targets(model: "PreTrainedModel", wanted: Sequence[str], key: str, frozen: Sequence[str] = ()) -> Targets:
    """The targets for `key`: names, or `all` for every linear layer and every expert, but not the output head.

    `all` also leaves out the layers of Mamba blocks whose weights fused kernels read directly.

    Of a multimodal model, the parts in `frozen` get no adapter, and under `all` neither does the
    projector. Raises `ModelError` for a name that nothing ends in.
    """
    senses = find_parts(model)
    closed = (*senses.encoders, *senses.projector, *frozen)
    experts = tuple(dict.fromkeys(_ending(n, 2) for n in expert_parameters(model) if not in_parts(n, closed)))
    if "all" in wanted:
        return _told_apart(model, _all_linear(model, (*senses.projector, *frozen)), experts)
    stacked = tuple(name for name in experts if any(part in wanted for part in (name, *name.split("."))))
    if frozen:
        wanted = _outside_of(model, wanted, frozen, key)
    parts = {part for name in stacked for part in (name, *name.split("."))}
    old = _former_names(model, wanted)
    rest = [word for word in wanted if word not in old and (word not in parts or _is_linear(model, word))]
    modules = require_modules(model, rest, key, also=[name.rpartition(".")[2] for name in experts])
    targets = _told_apart(model, modules, stacked)
    return Targets((*targets.modules, *old), targets.parameters)


def targets_inside(model: "nn.Module", targets: Targets, blocks: Sequence[str]) -> Targets:
    """Those of the targets that are inside `blocks`, by their full names."""

    def inside(names: Iterator[str], ends: Sequence[str]) -> tuple[str, ...]:
        starts = tuple(f"{block}." for block in blocks)
        tails = tuple(f".{end}" for end in ends)
        return tuple(name for name in names if name.startswith(starts) and name.endswith(tails)) if tails else ()

    modules = inside((name for name, _ in model.named_modules()), targets.modules)
    return Targets(modules, inside((name for name, _ in model.named_parameters()), targets.parameters))


def _outside_of(model: "nn.Module", wanted: Sequence[str], frozen: Sequence[str], key: str) -> tuple[str, ...]:
    """`wanted`, with the full names of the layers outside of `frozen` for each name that some inside share.

    Raises `ModelError` for a name that is found inside only.
    """
    names = [name for name, _ in linear_layers(model)]
    found: list[str] = []
    for word in wanted:
        meant = [name for name in names if name == word or name.endswith(f".{word}")]
        open_ones = [name for name in meant if not in_parts(name, frozen)]
        if meant and not open_ones:
            raise ModelError(
                f"{key}: {word}: is only in parts that freeze_vision_tower, freeze_multi_modal_projector or "
                "freeze_language_model leave as they are -> set the one it belongs to to false, or name others"
            )
        found += [word] if open_ones == meant else open_ones
    return tuple(found)


def _all_linear(model: "PreTrainedModel", closed: Sequence[str]) -> tuple[str, ...]:
    """Every linear layer but the output head or the score layer.

    By last name, or by full name where others share that last name. `closed`: parts of the model that are left out.
    """
    head, passed_by = model.get_output_embeddings(), {SCORE_LAYER, *_passed_by(model)}
    full = [
        name
        for name, module in linear_layers(model)
        if module is not head and name not in passed_by and not in_parts(name, closed)
    ]
    ours = set(full)
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in ours}
    short = {name.rpartition(".")[2] for name in full}
    if short & others or any(name.isdecimal() for name in short):
        return tuple(full)
    return tuple(sorted(short))


def _passed_by(model: "nn.Module") -> Iterator[str]:
    """Layers of state-space blocks (Mamba) whose weights fused kernels read without calling the layer.

    An adapter there would have no effect on an accelerator. Such a block has the parameters A_log and D of its own.
    """
    for owner, block in model.named_modules():
        if {"A_log", "D"} <= {name for name, _ in block.named_parameters(recurse=False)}:
            yield from (f"{owner}.{name}" for name, _ in linear_layers(block) if name and name != "in_proj")


def _is_linear(model: "nn.Module", word: str) -> bool:
    return any(name == word or name.endswith(f".{word}") for name, _ in linear_layers(model))


def _told_apart(model: "PreTrainedModel", modules: Sequence[str], parameters: Sequence[str]) -> Targets:
    """Layers with a name that experts had when they were layers, before transformers 5, are named by their weight.

    peft reads `gate_proj` in a mixture as that of the experts, and would leave out a dense layer of the same name. The
    two last parts of a name are enough where no layer beside those that are meant shares them.
    """
    taken = set(modules) - _kept_by_peft(model, modules)
    layers = [name for name, _ in linear_layers(model)]
    names = [name for name in layers if any(name == t or name.endswith(f".{t}") for t in taken)]
    shared = {_ending(name, 2) for name in set(layers) - set(names)}
    by_weight = dict.fromkeys(f"{name if _ending(name, 2) in shared else _ending(name, 2)}.weight" for name in names)
    return Targets(tuple(name for name in modules if name not in taken), (*parameters, *by_weight))


def _former_names(model: "PreTrainedModel", wanted: Sequence[str]) -> tuple[str, ...]:
    """Names that only the experts of older versions had, e.g. `gate_proj`; peft translates them."""
    last = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    absent = [word for word in wanted if word.rpartition(".")[2] not in last]
    return tuple(word for word in absent if word not in _kept_by_peft(model, wanted))


def _kept_by_peft(model: "PreTrainedModel", modules: Sequence[str]) -> set[str]:
    """Those of `modules` that peft reads as names of layers. Raises `ModelError` for half of a fused pair."""
    import peft
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    trial = peft.LoraConfig(target_modules=list(modules))
    try:
        convert_peft_config_for_transformers(trial, model, None)
    except ValueError as fault:
        raise ModelError(f"lora_target: {', '.join(modules)}: {fault}") from fault
    return set(trial.target_modules or ())


def _ending(name: str, num_parts: int) -> str:
    """The last parts of a name: two of `model.layers.0.mlp.experts.down_proj` are `experts.down_proj`."""
    return ".".join(name.split(".")[-num_parts:])
