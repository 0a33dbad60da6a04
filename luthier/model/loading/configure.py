"""What the keys of a run change in a model: its config before it is built, and which of its parts may learn."""

from typing import TYPE_CHECKING

from luthier.core.errors import ModelError
from luthier.core.log import info, warn
from luthier.core.machine import Machine
from luthier.model.adapters._merge import GivenAdapters, adapter_path
from luthier.model.attention import SHIFTED, Attention
from luthier.model.classes import adapter_gives_scores, gives_scores, is_routed, make_scorer, require_kind
from luthier.model.features.mixture_of_depths import convert
from luthier.model.features.rope_scaling import stretch_context, take_from_adapter
from luthier.model.features.router_balance import set_router_loss
from luthier.model.features.shifted_attention import shift_attention
from luthier.model.files.hubs import hub_token
from luthier.model.multimodal import frozen_parts
from luthier.model.quantization._prequantized import require_trainable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from luthier.config.keys.finetuning import FinetuningConfig
    from luthier.config.keys.model import ModelConfig
    from luthier.config.runs import TrainRun


def given_adapters(keys: "ModelConfig") -> GivenAdapters:
    return GivenAdapters(
        keys.adapter_name_or_path, keys.adapter_folder, keys.model_revision, keys.cache_dir, hub_token(keys)
    )


def fit_training_config(run: "TrainRun", config: "PreTrainedConfig") -> None:
    """Raises `ModelError` for a model that has not what a key asks for."""
    require_trainable(run, config)
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


def fit_task(keys: "ModelConfig", config: "PreTrainedConfig", *, scores: bool | None, starts_score: bool) -> bool:
    """Make `config` that of a reward model if it is to be one. Returns whether its score layer may be fresh.

    `starts_score`: a model that writes becomes one that scores; else it does only if an adapter was trained so.
    `scores`: what is wanted, None for whatever it is. Raises `ModelError` if it is the other.
    """
    given = given_adapters(keys)
    by_adapter = next((name for name in given.names if adapter_gives_scores(adapter_path(name, given))), "")
    if (by_adapter or starts_score) and not gives_scores(config):
        make_scorer(config)
    if scores is not None:
        require_kind(by_adapter or keys.model_name_or_path, config, scores=scores)
    return starts_score or bool(by_adapter)


def require_depths(keys: "ModelConfig", config: "PreTrainedConfig") -> None:
    """Raises `ModelError` if a mixture of depths is to be loaded and the model is none."""
    if keys.mixture_of_depths == "load" and not is_routed(config):
        raise ModelError(
            f"mixture_of_depths: load: {keys.model_name_or_path} is a dense model -> set mixture_of_depths: convert and"
            " train it first, or leave the key out"
        )


def replace_layers(base: "PreTrainedModel", keys: "ModelConfig", attention: Attention, machine: Machine) -> Attention:
    """What training changes in layers: fused kernels, routers, shifted attention. Returns the attention there now."""
    if keys.enable_liger_kernel:
        apply_liger_kernels(base, machine)
    if keys.mixture_of_depths == "convert":
        convert(base)
    if not keys.shift_attn:
        return attention
    shift_attention(base)
    return Attention(SHIFTED)


def apply_liger_kernels(base: "PreTrainedModel", machine: Machine) -> None:
    """`enable_liger_kernel`: fused norms, rotations and gated layers in the place of the model's own.

    Not its fused loss: the head runs on the labelled positions alone here (`luthier.model.heads.output_head`), which
    saves more.
    """
    if machine.device == "cpu":
        warn("enable_liger_kernel: its kernels need a GPU, so the layers of the model itself run")
        return
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from transformers.integrations.liger import apply_liger_kernel

    model_type = base.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        warn(f"enable_liger_kernel: the library has no kernels for models of the type {model_type}")
        return
    apply_liger_kernel(base, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    info("enable_liger_kernel: norms, rotations and gated layers run in fused kernels")


def resolved_settings(model: "PreTrainedModel") -> dict[str, str]:
    """What a run that leaves some choices open has computed with, for the manifest."""
    facts = {"attention": model.config._attn_implementation, "dtype": str(model.dtype).removeprefix("torch.")}
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kind = parameters.get("full_attention", parameters).get("rope_type", "default")
    return facts if kind == "default" else {**facts, "rope": kind}


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
