"""The features of `luthier.model.features`, applied in one order."""

from typing import TYPE_CHECKING

from luthier.model.features import Feature, Purpose
from luthier.model.features.liger import FEATURE as LIGER
from luthier.model.features.mixture_of_depths import FEATURE as MIXTURE_OF_DEPTHS
from luthier.model.features.new_tokens import FEATURE as NEW_TOKENS
from luthier.model.features.rope_scaling import FEATURE as ROPE_SCALING
from luthier.model.features.router_balance import FEATURE as ROUTER_BALANCE
from luthier.model.features.shifted_attention import FEATURE as SHIFTED_ATTENTION

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from luthier.config.runs import Run

ORDER: tuple[Feature, ...] = (
    ROPE_SCALING,
    ROUTER_BALANCE,
    LIGER,  # replaces layers by their class, so before routers change the classes of blocks
    MIXTURE_OF_DEPTHS,
    SHIFTED_ATTENTION,
    NEW_TOKENS,
)


def change_config(run: "Run", config: "PreTrainedConfig", purpose: Purpose) -> None:
    """Before the model is built. Raises `ModelError` for a model that does not have what a key needs."""
    for feature in ORDER:
        if feature.on_config is not None:
            feature.on_config(getattr(run.features, feature.name), config, purpose)


def change_model(run: "Run", model: "PreTrainedModel", purpose: Purpose) -> None:
    """When the weights are in place. Raises `ModelError` as `change_config`."""
    for feature in ORDER:
        if feature.on_model is not None:
            feature.on_model(getattr(run.features, feature.name), model, purpose)
