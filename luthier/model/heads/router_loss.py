"""The balance loss of a mixture-of-experts model, caught during the forward pass."""

from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.model.dtype import autocast_of_training
from luthier.model.modules import unwrap

if TYPE_CHECKING:
    from torch import Tensor, nn


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
