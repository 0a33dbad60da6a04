"""Fused norms, rotary embeddings and gated layers of the library liger-kernel: `enable_liger_kernel`.

https://arxiv.org/abs/2410.10989. Its fused loss is not used: `luthier.model.heads.output_head` computes logits at the
labeled positions only, which saves more memory.

Beside the layers of the model, the library replaces classes and functions in the modules of transformers, and for some
models `torch.nn.LayerNorm`. A class is put back at once: models that are loaded later, such as a reference, would be
built of it, and `LigerSwiGLUMLP` has no biases, whatever the config says. They have their own layers and the fast path.
The functions, such as rotations, are looked up whenever an attention runs, so they stay until `restoring_layers` ends
the run; models of the same type share them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rules, in_training, missing_library
from luthier.core.log import info, warn
from luthier.core.versions import is_installed
from luthier.model.features import Feature, Purpose

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class LigerConfig:
    enable_liger_kernel: bool = False
    """Replace norms, rotary embeddings and gated MLPs by fused kernels of the library liger-kernel, on a GPU."""


RULES = Rules(
    in_training(
        missing_library(
            "enable_liger_kernel",
            "liger-kernel",
            "pip install liger-kernel",
            lambda run: run.features.liger.enable_liger_kernel and not is_installed("liger_kernel"),
        ),
    )
)


def on_model(keys: LigerConfig, model: "PreTrainedModel", purpose: Purpose) -> None:
    """On a CPU, and for models that the library does not know, nothing changes and a warning says so."""
    if not keys.enable_liger_kernel or purpose.training is None:
        return
    if purpose.machine.device == "cpu":
        warn("enable_liger_kernel: its kernels need a GPU, so the layers of the model itself run")
        return
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    from torch import nn
    from transformers.integrations.liger import apply_liger_kernel

    model_type = model.config.model_type
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        warn(f"enable_liger_kernel: the library has no kernels for models of the type {model_type}")
        return
    before = {module: dict(vars(module)) for module in (nn, *_modules_of_models())}
    apply_liger_kernel(model, {"fused_linear_cross_entropy": False, "cross_entropy": False})
    for module, own in before.items():
        for name, value in own.items():
            if vars(module)[name] is value:
                continue
            if isinstance(value, type):
                setattr(module, name, value)
            else:
                _REPLACED.append((module, name, value))
    info("enable_liger_kernel: norms, rotations and gated layers run in fused kernels")


_REPLACED: list[tuple[ModuleType, str, Any]] = []
"""Module of transformers, name, and the function that transformers itself has there."""


def _modules_of_models() -> list[ModuleType]:
    return [module for name, module in list(sys.modules.items()) if name.startswith("transformers.models.")]


@contextmanager
def restoring_layers() -> Iterator[None]:
    """Wraps a run. The models of the next run of this process are those of transformers."""
    try:
        yield
    finally:
        while _REPLACED:  # the first replacement last
            setattr(*_REPLACED.pop())


FEATURE = Feature(name="liger", config=LigerConfig, check=RULES, on_model=on_model)
