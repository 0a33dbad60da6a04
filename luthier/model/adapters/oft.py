"""Orthogonal finetuning, y = W (R x) + b with a block-diagonal rotation R, through peft.

https://arxiv.org/abs/2306.07280, in the form that rotates the input (https://arxiv.org/abs/2506.19847). Each block of R
is the Cayley transform of a skew-symmetric matrix Q, R = (I + Q) (I - Q)^-1, with the inverse as a short series, and
Q = 0 at the start. On a quantized base it is called QOFT.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.config.rules.engine import Rule, Rules, at_least, within
from luthier.core.errors import ModelError
from luthier.core.log import info
from luthier.model.adapters import Adapter
from luthier.model.adapters._merge import GivenAdapters, continue_adapter, merge_adapters
from luthier.model.adapters._new_adapter import NEW_ADAPTER_RULES, common_settings, start_adapter, target_rules
from luthier.model.adapters._new_rows import add_rows
from luthier.model.adapters._targets import find_targets, targets_inside
from luthier.model.compat.oft_dimensions import rotate_any_dimensions
from luthier.model.embeddings import NewRows, NewTokens
from luthier.model.llama_pro import inserted_blocks

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class OftConfig:
    additional_target: tuple[str, ...] = ()
    """Modules trained in full beside the adapter and saved with it."""
    module_dropout: float = 0.0
    """Share of the blocks of each rotation that are left out at random while training."""
    oft_rank: int = 0
    """Number of blocks of each rotation; 0 derives it from the block size."""
    oft_block_size: int = 32
    """Side of a block of each rotation; not read if oft_rank is given."""
    oft_target: tuple[str, ...] = ("all",)
    """Names of the modules that get a rotation, or `all` for every linear layer but the output head."""
    lora_target: tuple[str, ...] = ("all",)
    """The former name of oft_target."""
    create_new_adapter: bool = False
    """Merge the adapters given by `adapter_name_or_path` and train a fresh one."""
    use_llama_pro: bool = False
    """Rotate only in the blocks that `luthier expand` inserted (LLaMA Pro, https://arxiv.org/abs/2401.02415)."""
    freeze_trainable_layers: int = 2
    """With use_llama_pro: how many blocks were inserted."""


RULES = Rules(
    (
        *NEW_ADAPTER_RULES,
        *target_rules("oft_target"),
        at_least("adapter", "oft_rank", 0),
        at_least("adapter", "oft_block_size", 2),
        within("adapter", "module_dropout", 0, 1, or_high=False),
        Rule(
            ("rollout_backend", "finetuning_type"),
            "serves LoRA adapters and whole weights, and this is another kind of adapter",
            "leave it out",
            lambda run: run.given.get("rollout_backend") == "vllm",
        ),
        Rule(
            ("oft_rank", "oft_block_size"),
            "rank times block size is the width of a layer, so one of them decides the other",
            "give one of the two",
            lambda run: run.adapter.oft_rank > 0 and "oft_block_size" in run.changed,
        ),
        Rule(
            ("oft_target", "lora_target"),
            "names other modules than lora_target, which is the former name of the same key",
            "give one of the two",
            lambda run: (
                {"oft_target", "lora_target"} <= run.changed
                and set(run.adapter.oft_target) != set(run.adapter.lora_target)
            ),
        ),
    )
)


def apply(
    model: "PreTrainedModel",
    config: OftConfig,
    *,
    given: GivenAdapters,
    new_tokens: NewTokens | None = None,
    pure_bf16: bool,
    frozen: Sequence[str] = (),
    original: "Callable[[], PreTrainedModel] | None" = None,
) -> "PeftModel":
    """Freeze the model and put a trainable rotation before each target. `given` adapters are handled as by LoRA.

    Raises `ModelError` for names that no module has, layers that peft cannot rotate and adapters that do not fit.
    """
    import peft

    if given and not config.create_new_adapter:
        return continue_adapter(model, given, new_tokens, pure_bf16=pure_bf16)
    model = merge_adapters(model, given.names, given)
    rows = new_tokens.give_rows(model) if new_tokens else NewRows()
    key = "lora_target" if "all" in config.oft_target and "all" not in config.lora_target else "oft_target"
    wanted = config.lora_target if key == "lora_target" else config.oft_target
    targets = find_targets(model, wanted, key, frozen)
    if config.use_llama_pro:
        targets = targets_inside(model, targets, inserted_blocks(model, config.freeze_trainable_layers))
    if targets.parameters:
        info(
            f"{key}: weights that are not layers, or share the name of an expert, stay: {', '.join(targets.parameters)}"
        )
    if not targets.modules:
        raise ModelError(f"{key}: {', '.join(wanted)}: none of these is a layer -> name linear layers, or all")
    settings = peft.OFTConfig(
        **common_settings(model, config.additional_target),
        r=config.oft_rank,
        oft_block_size=0 if config.oft_rank else config.oft_block_size,
        module_dropout=config.module_dropout,
        target_modules=list(targets.modules),
    )
    add_rows(model, settings, rows, key)
    rotate_any_dimensions()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Invalid `(oft_block_size|r)`")  # `_tell_sizes` says it
        adapted = start_adapter(model, settings, key=key, wanted=wanted, pure_bf16=pure_bf16)
    _tell_sizes(adapted, config)
    return adapted


def _tell_sizes(adapted: "PeftModel", config: OftConfig) -> None:
    """Where the width of a layer is not a multiple of the requested size, peft takes the nearest divisor."""
    from peft.tuners.oft import OFTLayer

    key, asked = ("oft_rank", config.oft_rank) if config.oft_rank else ("oft_block_size", config.oft_block_size)
    taken = set()
    for module in adapted.modules():
        if isinstance(module, OFTLayer):
            if module.oft_block_size["default"] == 1:
                raise ModelError(
                    f"{key}: {asked}: blocks of one number cannot be rotated, and a layer of width"
                    f" {module.in_features} has no others with it -> lower oft_rank, or give an even oft_block_size"
                )
            size = (module.r if config.oft_rank else module.oft_block_size)["default"]
            if size != asked:
                taken.add(f"{size} for {module.in_features}")
    if taken:
        info(f"{key}: {asked}: does not divide the width of every layer; taken instead: {', '.join(sorted(taken))}")


ADAPTER = Adapter(name="oft", config=OftConfig, apply=apply, adds_weights=True, check=RULES)
