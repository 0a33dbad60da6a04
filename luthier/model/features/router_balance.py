"""The loss that balances the experts of a mixture-of-experts model: `moe_aux_loss_coef`.

Switch Transformers, https://arxiv.org/abs/2101.03961, equations 4 to 6: with N experts, f_i the share of tokens that
expert i gets and P_i the mean probability the router gives it, the loss is N sum_i f_i P_i. It is smallest where all
experts get the same. The model computes it beside its logits; here it is switched on and handed to the loss of a stage.

It is a mean over the tokens of one forward pass. So that an optimizer step does not depend on how it is cut into
batches more than it must, each batch counts by its number of labeled tokens: with one batch per step the total is what
transformers computes, cross-entropy + coefficient x balance.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.config.rules.engine import Rules, When, at_least, in_training, is_given, is_set
from luthier.core.errors import ModelError
from luthier.core.kinds import STAGES
from luthier.model.features import Feature, Purpose

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterBalanceConfig:
    moe_aux_loss_coef: float | None = None
    """Weight of the loss that balances the experts of a mixture-of-experts model."""


_balances = When(is_given("features.router_balance", "moe_aux_loss_coef"))

RULES = Rules(
    in_training(
        at_least("features.router_balance", "moe_aux_loss_coef", 0),
        _balances.warns(
            ("moe_aux_loss_coef", "stage"),
            "is added to the loss of the stages pt, sft and gkd only",
            "leave it out",
            lambda run: not STAGES.get(run.stage).supports_router_loss,
        ),
        _balances.refuses(
            ("use_unsloth_gc", "moe_aux_loss_coef"),
            "uses reentrant checkpointing, in which the routers of experts get no gradient",
            "leave one of the two out",
            is_set("model", "use_unsloth_gc"),
        ),
    )
)


_COEFFICIENT = re.compile(r"(^|_)aux_loss_(coef|alpha)$")


def coefficient_field(config: "PreTrainedConfig") -> str | None:
    """What the config of a model calls the weight of its balance loss; None if it has none."""
    return next((name for name in config.get_text_config().to_dict() if _COEFFICIENT.search(name)), None)


def set_router_loss(config: "PreTrainedConfig", coefficient: float) -> None:
    """Raises `ModelError` for a model without a balance loss. The config is saved with the model."""
    field, text = coefficient_field(config), config.get_text_config()
    if field is None or text.is_encoder_decoder:
        raise ModelError(
            f"moe_aux_loss_coef: models of the type {text.model_type} have no router balance loss"
            " -> leave moe_aux_loss_coef out"
        )
    setattr(text, field, coefficient)


def on_config(keys: RouterBalanceConfig, config: "PreTrainedConfig", purpose: Purpose) -> None:
    if keys.moe_aux_loss_coef is not None and purpose.training is not None:
        set_router_loss(config, keys.moe_aux_loss_coef)


FEATURE = Feature(name="router_balance", config=RouterBalanceConfig, check=RULES, on_config=on_config)
