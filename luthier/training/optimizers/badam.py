"""BAdam (https://arxiv.org/abs/2404.02827): block coordinate descent with some steps of Adam on each block.

    for each block i in turn:  m, v <- 0;  K times:  theta_i <- theta_i - eta * Adam(dL / d theta_i)

Layer mode: a block is a layer of the model. Embeddings, the output head and the norm before it are frozen. Only the
trained block has gradients, moments and, if the model is in 16 bits, a float32 copy.
Ratio mode: a random share of each weight except embeddings is trained; gradients are computed for the whole weight.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from luthier.config.rules.engine import Rule, Rules, all_of, at_least, is_changed, is_other_than, warning
from luthier.core.errors import InvalidInput
from luthier.core.log import info
from luthier.training.optimizers import (
    ANY_BASE,
    Optimizer,
    Phase,
    one_process,
    only_optimizer,
    requires_optim,
    requires_whole_weights,
    whole_model,
)

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer
    from transformers import TrainingArguments

    from luthier.training.optimizers._badam import Picks


@dataclass(frozen=True, slots=True, kw_only=True)
class BadamConfig:
    use_badam: bool = False
    """Train one block of the model at a time (https://arxiv.org/abs/2404.02827)."""
    badam_mode: Literal["layer", "ratio"] = "layer"
    """What a block is: a layer, or a random share of all weights."""
    badam_start_block: int | None = None
    """The first block to train, counted from 0; unset takes the first of the order."""
    badam_switch_mode: Literal["ascending", "descending", "random", "fixed"] | None = "ascending"
    """Order of the blocks; null is `ascending`."""
    badam_switch_interval: int | None = 50
    """Steps before the next block, or the next share of the weights; -1 never switches."""
    badam_update_ratio: float = 0.05
    """Share of the weights to train, with `badam_mode: ratio`."""
    badam_mask_mode: Literal["adjacent", "scatter"] = "adjacent"
    """Whether these weights are adjacent or scattered."""
    badam_verbose: int = 0
    """What is logged: 0 nothing, 1 each new block, 2 its weights too."""


def _is_no_interval(run: Any) -> bool:
    interval = run.optimizers["badam"].badam_switch_interval
    return interval is None or (interval < 1 and interval != -1)


OF_MODE = {"layer": ("badam_start_block", "badam_switch_mode"), "ratio": ("badam_update_ratio", "badam_mask_mode")}
"""Mode -> the keys that only it reads."""

RULES = Rules(
    (
        only_optimizer("use_badam"),
        *requires_whole_weights("use_badam"),
        whole_model("use_badam"),
        requires_optim("use_badam", ANY_BASE),
        one_process("use_badam", "each process would train its own block", lambda run: True),
        Rule(
            ("badam_switch_interval",),
            "must be at least 1, or -1",
            "50 is a common value",
            _is_no_interval,
        ),
        Rule(
            ("badam_update_ratio",),
            "must be above 0 and up to 1",
            "",
            lambda run: not 0 < run.optimizers["badam"].badam_update_ratio <= 1,
        ),
        at_least("optimizers.badam", "badam_start_block", 0, remedy="the first layer is 0"),
        Rule(
            ("badam_verbose",),
            "must be 0, 1 or 2",
            "",
            lambda run: run.optimizers["badam"].badam_verbose not in (0, 1, 2),
        ),
        *(
            warning(
                (key, "badam_mode"),
                f"is read by badam_mode: {mode} only",
                f"set badam_mode: {mode}, or leave it out",
                all_of(is_changed(key), is_other_than("optimizers.badam", "badam_mode", mode)),
            )
            for mode, keys in OF_MODE.items()
            for key in keys
        ),
    )
)


def build(model: "nn.Module", args: "TrainingArguments", config: BadamConfig) -> "TorchOptimizer":
    """Raises `InvalidInput` if there is no block `badam_start_block`."""
    from luthier.training.optimizers._badam import BlockCoordinateDescent
    from luthier.training.optimizers._groups import base_optimizer, parameter_groups

    assert config.badam_switch_interval is not None, "the rules require an interval"
    names = {weight: name for name, weight in model.named_parameters() if weight.requires_grad}
    blocks = blocks_of(model)
    is_layer_mode = config.badam_mode == "layer"
    part_of, picks = layers_in_turn(blocks, config, args.seed) if is_layer_mode else shares(names, config, args.seed)
    members = {weight for block in blocks for weight in block} if is_layer_mode else set(picks(0))
    for weight in names.keys() - members:
        weight.requires_grad_(False)

    def report(part: int) -> None:
        if config.badam_verbose:
            weights = "".join(f"\n  {names[weight]}" for weight in picks(part)) if config.badam_verbose > 1 else ""
            info(f"BAdam: training block {part}{weights}")

    return BlockCoordinateDescent(
        [group for groups in parameter_groups(model, args.weight_decay).values() for group in groups],
        base_optimizer(model, args),
        part_of,
        picks,
        lr=args.learning_rate,
        switch_interval=config.badam_switch_interval,
        report=report,
    )


def blocks_of(model: "nn.Module") -> "list[list[nn.Parameter]]":
    """The trainable weights of each layer, without layers that have none."""
    from luthier.model.modules import layer_list

    _, layers = layer_list(model)  # type: ignore[arg-type]
    blocks = [[weight for weight in layer.parameters() if weight.requires_grad] for layer in layers]
    return [block for block in blocks if block]


def layers_in_turn(
    blocks: "list[list[nn.Parameter]]", config: BadamConfig, seed: int
) -> "tuple[Callable[[int], int], Callable[[int], Picks]]":
    """(turn -> index of the trained layer, index -> its weights)."""
    from luthier.training.optimizers._badam import block_order

    start = config.badam_start_block
    if start is not None and start >= len(blocks):
        raise InvalidInput(f"badam_start_block: {start}: this model has the blocks 0 to {len(blocks) - 1}")
    order = block_order(len(blocks), config.badam_switch_mode or "ascending", start, seed)
    return order, lambda number: dict.fromkeys(blocks[number])


def shares(
    names: "Mapping[nn.Parameter, str]", config: BadamConfig, seed: int
) -> "tuple[Callable[[int], int], Callable[[int], Picks]]":
    """Each turn trains another share of every weight except embeddings."""
    from luthier.training.optimizers._badam import share_of

    weights = [weight for weight, name in names.items() if "embed" not in name]
    adjacent = config.badam_mask_mode == "adjacent"
    return lambda turn: turn, share_of(weights, config.badam_update_ratio, adjacent=adjacent, seed=seed)


def phases(model: "nn.Module", args: "TrainingArguments", config: BadamConfig, num_steps: int) -> list[Phase]:
    """A layer takes the more time and memory the lower it is: the backward pass ends at it. So the lowest and the
    highest of the trained layers stand for all, beside the largest."""
    if config.badam_mode == "ratio":
        return [Phase(replace(config, badam_switch_interval=-1))]
    blocks, interval = blocks_of(model), config.badam_switch_interval
    assert interval is not None, "the rules require an interval"
    order, _ = layers_in_turn(blocks, config, args.seed)
    num_turns = 1 if interval < 0 else -(-num_steps // interval)
    lengths = [num_steps if interval < 0 else min(interval, num_steps - turn * interval) for turn in range(num_turns)]
    trained = [order(turn) for turn in range(num_turns)]
    low, high = min(trained), max(trained)
    mean = sum(block * length for block, length in zip(trained, lengths, strict=True)) / num_steps
    share = (mean - low) / (high - low) if high > low else 0.0
    sizes = [sum(weight.numel() for weight in block) for block in blocks]
    largest = max(trained, key=lambda block: (sizes[block], block == low))

    def alone(block: int) -> BadamConfig:
        return replace(config, badam_switch_mode="fixed", badam_start_block=block, badam_switch_interval=-1)

    shares = {low: 1 - share} | ({high: share} if high > low else {})
    return [Phase(alone(block), shares.get(block, 0.0)) for block in {**shares, largest: None}]


OPTIMIZER = Optimizer(
    name="badam",
    switch="use_badam",
    config=BadamConfig,
    build=build,
    check=RULES,
    phases=phases,
    freezes=True,
)
