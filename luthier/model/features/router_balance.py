"""The loss that balances the experts of a mixture-of-experts model: `moe_aux_loss_coef`.

Switch Transformers, https://arxiv.org/abs/2101.03961, equations 4 to 6: with N experts, f_i the share of tokens that
expert i gets and P_i the mean probability the router gives it, the loss is N sum_i f_i P_i. It is smallest where all
experts get the same. The model computes it beside its logits; here it is switched on and handed to the loss of a stage.

It is a mean over the tokens of one forward pass. So that an optimizer step does not depend on how it is cut into
batches more than it must, each batch counts by its number of labelled tokens: with one batch per step the total is what
transformers computes, cross-entropy + coefficient x balance.
"""

import re
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.model.adapters._merge import unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

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


class RouterLoss:
    """Listens to a model: every forward pass while it trains leaves the balance loss of its tokens here."""

    def __init__(self, model: "nn.Module", coefficient: float) -> None:
        self.coefficient = coefficient
        self._latest: Tensor | None = None
        base = unwrap(model)
        base.register_forward_pre_hook(self._ask, with_kwargs=True)
        base.register_forward_hook(self._listen)

    def _ask(self, model: "nn.Module", args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "output_router_logits": True} if model.training else kwargs

    def _listen(self, model: "nn.Module", args: Any, output: Any) -> None:
        if model.training:
            self._latest = getattr(output, "aux_loss", None)

    def take(self) -> "Tensor | None":
        """The balance loss of the latest forward pass, once; None if the model was not training."""
        latest, self._latest = self._latest, None
        return latest


def listen_to_router(model: "nn.Module", coefficient: float) -> RouterLoss:
    """`model`: bare or with adapters. Raises `ModelError` if its forward pass gives no balance loss (it is tried)."""
    import torch

    from luthier.model.dtype import autocast_of_training

    base = unwrap(model)
    listener, was_training = RouterLoss(model, coefficient), base.training
    device: Any = base.get_input_embeddings().weight.device
    base.train()
    try:
        with torch.no_grad(), autocast_of_training(base):
            base(input_ids=torch.tensor([[0, 1]], device=device), use_cache=False)
    finally:
        base.train(was_training)
    if listener.take() is None:
        raise ModelError(
            f"moe_aux_loss_coef: {type(base).__name__} gives no router balance loss -> leave moe_aux_loss_coef out"
        )
    return listener
