"""Train every weight of the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.config.keys.fields import refused
from luthier.model.adapters import Adapter
from luthier.model.adapters._merge import GivenAdapters
from luthier.model.embeddings import NewTokens
from luthier.model.multimodal import freeze_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class FullConfig:
    use_llama_pro: bool = refused(
        False, "trains inserted blocks and nothing else, and full trains everything", "set finetuning_type: freeze"
    )
    """Train the blocks that an expansion inserted."""


def apply(
    model: "PreTrainedModel",
    config: FullConfig,
    *,
    given: GivenAdapters,
    new_tokens: NewTokens | None = None,
    pure_bf16: bool,
    frozen: Sequence[str] = (),
    original: "Callable[[], PreTrainedModel] | None" = None,
) -> "PreTrainedModel":
    """Raises `ModelError` if `frozen` leaves nothing."""
    if new_tokens:
        new_tokens.give_rows(model)
    model.requires_grad_(True)
    freeze_parts(model, frozen)
    return model


ADAPTER = Adapter(name="full", config=FullConfig, apply=apply, trains_everything=True)
