"""Train every weight of the model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.config.fields import refused
from luthier.model.adapters import Adapter
from luthier.model.merge import GivenAdapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class FullConfig:
    use_llama_pro: bool = refused(
        False, "trains inserted blocks and nothing else, and full trains everything", "set finetuning_type: freeze"
    )
    """Train the blocks that an expansion inserted."""


def apply(
    model: "PreTrainedModel", config: FullConfig, *, given: GivenAdapters, train_embeddings: bool, pure_bf16: bool
) -> "PreTrainedModel":
    return model.requires_grad_(True)


ADAPTER = Adapter(name="full", config=FullConfig, apply=apply)
