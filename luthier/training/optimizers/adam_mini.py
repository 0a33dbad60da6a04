"""Adam-mini (https://arxiv.org/abs/2406.16793): AdamW with one second moment per block b of weights.

    m <- b1 m + (1 - b1) g        v_b <- b2 v_b + (1 - b2) mean(g_b^2)
    w <- w - eta wd w             w_b <- w_b - eta (m / (1 - b1^t)) / (sqrt(v_b / (1 - b2^t)) + eps)

The blocks follow the dense blocks of a transformer's Hessian: one per head of a query or key matrix, one per output
neuron (a row) of every other matrix, so one per token in embeddings and output heads, and one for a whole bias or norm.
The optimizer state is about half that of AdamW.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.config.rules.engine import Rules
from luthier.training.optimizers import ADAMW, Optimizer, only_optimizer, requires_optim, requires_whole_weights

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer as TorchOptimizer
    from transformers import TrainingArguments


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamMiniConfig:
    use_adam_mini: bool = False
    """One learning rate per block of weights instead of one per weight (https://arxiv.org/abs/2406.16793)."""


RULES = Rules(
    (only_optimizer("use_adam_mini"), *requires_whole_weights("use_adam_mini"), requires_optim("use_adam_mini", ADAMW))
)

QUERY_KEY_NAMES = ("q_proj", "k_proj", "query", "key", "wq", "wk")


def build(model: "nn.Module", args: "TrainingArguments", config: AdamMiniConfig) -> "TorchOptimizer":
    from luthier.training.optimizers._adam_mini import AdamMini
    from luthier.training.optimizers._groups import parameter_groups

    head_size = head_size_of(model)
    groups = parameter_groups(
        model, args.weight_decay, lambda name, weight: block_shape(name, tuple(weight.shape), head_size)
    )
    return AdamMini(
        [{**group, "block": block} for block, members in groups.items() for group in members],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
    )


def head_size_of(model: "nn.Module") -> int:
    """Rows of a query or key matrix per head."""
    from luthier.model.modules import unwrap

    text = unwrap(model).config.get_text_config()
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def block_shape(name: str, shape: tuple[int, ...], head_size: int) -> str | int:
    """Rows per block of the weight; `whole` if the whole weight is one block."""
    if len(shape) < 2:
        return "whole"
    is_query_or_key = any(part in QUERY_KEY_NAMES for part in name.split("."))
    return head_size if is_query_or_key and shape[0] % head_size == 0 and "lora_A" not in name else 1


OPTIMIZER = Optimizer(name="adam_mini", switch="use_adam_mini", config=AdamMiniConfig, build=build, check=RULES)
