"""KTransformers' copies of transformers and accelerate: kt-kernel loads and computes the experts.

Facts from transformers-kt 5.6.0.post6 (`integrations/kt.py`) and kt-kernel 0.7.2 (`sft/`).
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from luthier.config.sections import is_on
from luthier.core.machine import Machine
from luthier.core.versions import is_installed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def is_loading() -> bool:
    """Whether experts are left to kt-kernel while a model is loaded; the library sets this variable itself."""
    return is_on(os.environ, "ACCELERATE_USE_KT") and is_installed("kt_kernel")


def without_experts(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """The loading info of transformers without the weights that kt-kernel reads."""
    if not is_loading():
        return found
    from transformers.integrations.kt import is_kt_routed_expert_parameter_name as is_expert

    kept = {key: [name for name in found[key] if not is_expert(name)] for key in ("missing_keys", "unexpected_keys")}
    return {**found, **kept}


def place_experts(model: "PreTrainedModel", machine: Machine) -> None:
    """Everything but the experts goes to the GPU; accelerate leaves such a model where it is, and FSDP lays it out."""
    if is_loading() and machine.world_size == 1:
        from kt_kernel.sft import move_non_experts_to_gpu

        move_non_experts_to_gpu(model, device=f"{machine.device}:{machine.local_rank}")


def recomputing() -> Callable[[], Any]:
    """`context_fn` of PyTorch's checkpointing: tells the experts which of the two passes is being computed."""
    from kt_kernel.sft import get_activation_checkpoint_context_fn

    context_fn: Callable[[], Any] = get_activation_checkpoint_context_fn()
    return context_fn
