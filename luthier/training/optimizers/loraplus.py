"""LoRA+ (https://arxiv.org/abs/2402.12354): of the update B A, B has a higher learning rate than A.

    A <- A - eta * G_A        B <- B - lambda * eta * G_B

With one rate for both, feature learning is inefficient in wide models; the paper recommends a lambda of about 16.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.config.rules.engine import Rule, Rules, above, at_least
from luthier.model.adapters.lora import LoraConfig
from luthier.training.optimizers import Optimizer, only_optimizer

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer
    from transformers import TrainingArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPlusConfig:
    loraplus_lr_ratio: float | None = None
    """Learning rate of B divided by that of A (https://arxiv.org/abs/2402.12354); turns LoRA+ on."""
    loraplus_lr_embedding: float = 1e-6
    """Learning rate of adapters on embeddings under LoRA+."""


RULES = Rules(
    (
        only_optimizer("loraplus_lr_ratio"),
        Rule(
            ("loraplus_lr_ratio", "finetuning_type"),
            "is about the two matrices of LoRA",
            "set finetuning_type: lora, or leave it out",
            lambda run: not isinstance(run.adapter, LoraConfig),
        ),
        above("optimizers.loraplus", "loraplus_lr_ratio", 0, remedy="16 is a common value"),
        at_least("optimizers.loraplus", "loraplus_lr_embedding", 0),
    )
)


def build(model: "nn.Module", args: "TrainingArguments", config: LoraPlusConfig) -> "TorchOptimizer":
    """The optimizer of `optim` with one learning rate per kind of weight."""
    from luthier.training.optimizers._groups import base_optimizer, parameter_groups

    assert config.loraplus_lr_ratio is not None, "the switch is on"
    rates = {
        "A": args.learning_rate,
        "B": args.learning_rate * config.loraplus_lr_ratio,
        "embedding": config.loraplus_lr_embedding,
    }
    groups = parameter_groups(model, args.weight_decay, kind_of)
    return base_optimizer(model, args)(
        [{**group, "lr": rates[kind]} for kind, members in groups.items() for group in members]
    )


def kind_of(name: str, weight: "nn.Parameter") -> str:
    """Weights trained in full next to the adapter count as A. FSDP may have flattened any weight."""
    if "lora_embedding_" in name:
        return "embedding"
    return "B" if "lora_B" in name or (weight.ndim == 1 and "lora_A" not in name) else "A"


OPTIMIZER = Optimizer(
    name="loraplus",
    switch="loraplus_lr_ratio",
    config=LoraPlusConfig,
    build=build,
    check=RULES,
    has_own_state=False,
)
