"""What the keys of a run change in a model: its config before it is built, and which of its parts may learn."""

from typing import TYPE_CHECKING

from luthier.core.log import info
from luthier.model.merge import GivenAdapters, adapter_path
from luthier.model.parts import frozen_parts
from luthier.model.rope import stretch_context, take_from_adapter
from luthier.model.router import set_router_loss

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from luthier.config.finetuning import FinetuningConfig
    from luthier.config.model import ModelConfig
    from luthier.config.runs import TrainRun


def given_adapters(keys: "ModelConfig") -> GivenAdapters:
    return GivenAdapters(
        keys.adapter_name_or_path, keys.adapter_folder, keys.model_revision, keys.cache_dir, keys.hf_hub_token
    )


def fit_training_config(run: "TrainRun", config: "PreTrainedConfig") -> None:
    """Raises `ModelError` for a model that has not what a key asks for."""
    fit_positions(run.model, run.data.cutoff_len, config)
    if run.model.moe_aux_loss_coef is not None:
        set_router_loss(config, run.model.moe_aux_loss_coef)


def fit_positions(keys: "ModelConfig", cutoff_len: int | None, config: "PreTrainedConfig") -> None:
    """Positions as the last adapter was trained with, then as `rope_scaling` asks. `cutoff_len`: None for inference."""
    given = given_adapters(keys)
    if given:
        learned = take_from_adapter(config, adapter_path(given.names[-1], given))
        if learned:
            info(f"rope_scaling: {learned}")
    if keys.rope_scaling:
        info(f"rope_scaling: {stretch_context(config, keys.rope_scaling, cutoff_len=cutoff_len)}")


def parts_to_freeze(base: "PreTrainedModel", keys: "FinetuningConfig") -> tuple[str, ...]:
    """Names of what the freeze keys keep from learning; said once."""
    frozen = frozen_parts(
        base,
        freeze_vision_tower=keys.freeze_vision_tower,
        freeze_multi_modal_projector=keys.freeze_multi_modal_projector,
        freeze_language_model=keys.freeze_language_model,
    )
    if frozen:
        info(f"parts that do not learn: {', '.join(frozen)}")
    return frozen
