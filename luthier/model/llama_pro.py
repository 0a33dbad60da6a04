"""Block expansion (LLaMA Pro): inserted copies of blocks that are the identity at first.

https://arxiv.org/abs/2401.02415, section 3.1: after every L / N blocks a copy of the last one is inserted, with its
output projections set to zero, so x + Attention(x) = x and x + MLP(x) = x. Training then changes the copies only.

The output projections are not looked up by name. In the copy everything is zero at first. Weights get their values back
one by one, in the order in which the block uses them, as long as the block stays the identity. What is left at zero are
the output projections: each of them, once changed, changes the output of the block.
"""

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.model.classes import require_dense
from luthier.model.modules import layer_list

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

NUM_TOKENS = 64
"""Length of the text on which a block is tried."""


def expand_blocks(model: "PreTrainedModel", num_blocks: int) -> list[int]:
    """Insert `num_blocks` blocks into `model`, evenly, and write them into its config. Returns their places.

    The model is to be saved and loaded again before it computes. Raises `ModelError` for a number that does not divide
    that of the layers, and for blocks that do more than add to their input.
    """
    require_dense(model.config, "luthier expand")
    name, layers = layer_list(model)
    num_layers = len(layers)
    if num_blocks < 1 or num_layers % num_blocks:
        divisors = ", ".join(str(n) for n in range(1, num_layers + 1) if num_layers % n == 0)
        raise ModelError(
            f"--blocks {num_blocks}: {num_layers} layers cannot be cut into {num_blocks} equal groups -> give one of"
            f" {divisors}"
        )
    group = num_layers // num_blocks
    calls = _calls(model, layers)
    blocks: list[Any] = []
    for index, layer in enumerate(layers):
        blocks.append(layer)
        if index % group == group - 1:
            block = copy.deepcopy(layer)
            _silence(block, calls[index], f"{type(model).__name__}: {name}.{index}")
            blocks.append(block)
    from torch.nn import ModuleList

    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, ModuleList(blocks))
    _lengthen(model.config.get_text_config(), num_layers, group)
    return [index for index in range(num_layers + num_blocks) if index % (group + 1) == group]


def probe_ids(model: "PreTrainedModel") -> "Tensor":
    """(1, NUM_TOKENS) ids spread over the vocabulary."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, NUM_TOKENS), generator=generator)
    return ids.to(model.device)


def _calls(model: "PreTrainedModel", layers: "nn.ModuleList") -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each layer is called with while the model reads the probe."""
    import torch

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for layer in layers
    ]
    with torch.no_grad():
        model.eval()(input_ids=probe_ids(model), use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def _silence(block: "nn.Module", call: tuple[tuple[Any, ...], dict[str, Any]], where: str) -> None:
    """Set weights to zero so that the block is the identity. Raises `ModelError` if even all zeros do not suffice."""
    import torch

    args, kwargs = call

    def is_identity() -> bool:
        given = args[0] if args else kwargs["hidden_states"]
        with torch.no_grad():
            out = block(*args, **kwargs)
        return torch.equal(out[0] if isinstance(out, tuple) else out, given)

    weights = _in_order_of_use(block, is_identity)
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.zero_()
        if not is_identity():
            raise ModelError(
                f"{where}: this block changes its input even if all its weights are zero, so a copy of"
                " it cannot start as the identity"
            )
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
            if not is_identity():
                weight.zero_()


def _in_order_of_use(block: "nn.Module", run: Callable[[], Any]) -> "list[nn.Parameter]":
    """The weights of the block, those of modules that are called in the order of their first call, others first."""
    order: dict[int, int] = {}
    hooks = [
        module.register_forward_pre_hook(lambda module, _: order.setdefault(id(module), len(order) + 1) and None)
        for module in block.modules()
    ]
    run()
    for hook in hooks:
        hook.remove()
    owners = sorted(block.modules(), key=lambda module: order.get(id(module), 0))
    return [weight for module in owners for weight in module.parameters(recurse=False)]


def _lengthen(config: "PreTrainedConfig", num_layers: int, group: int) -> None:
    """The number of layers, and each list in the config that says something of every layer."""
    for key, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == num_layers and num_layers > 1:
            longer = []
            for index, entry in enumerate(value):
                longer += [entry, entry] if index % group == group - 1 else [entry]
            setattr(config, key, longer)
    config.num_hidden_layers = num_layers + num_layers // group


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
