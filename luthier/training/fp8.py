"""FP8 training: the settings that accelerate needs before the trainer is built.

accelerate swaps the linear layers when it prepares the model, except the first, the last, and those with sizes that are
not multiples of 16. Weights keep their dtype, so the saved model is an ordinary one. accelerate reads its settings from
`ACCELERATE_FP8_*` environment variables, since TrainingArguments has no keys for them.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from luthier.config.keys.fp8 import FP8_LIBRARIES, Fp8Config, installed_backend, missing_library
from luthier.core.errors import InvalidInput, MissingExtra
from luthier.core.log import info
from luthier.core.machine import Machine

if TYPE_CHECKING:
    from transformers import TrainingArguments

BACKENDS = {"torchao": "AO", "te": "TE", "msamp": "MSAMP"}
"""Our name -> accelerate's name."""
_BACKEND = "ACCELERATE_FP8_BACKEND"
NEEDED = (8, 9)
"""Compute capability of the first GPUs with FP8 (Ada); Hopper has 9.0."""


def switch_on(args: "TrainingArguments", keys: Fp8Config, machine: Machine) -> None:
    """Raises `InvalidInput` on a machine without FP8, `MissingExtra` without a library for it."""
    reason = reason_against(machine)
    if reason:
        raise InvalidInput(f"fp8: true: {reason} -> leave fp8 out and keep bf16: true")
    backend = installed_backend(keys)
    if backend is None:
        modules, remedy = missing_library(keys)
        raise MissingExtra(f"fp8: true: needs the library {modules}, which is not installed -> {remedy}")
    args.mixed_precision = "fp8"
    info(f"fp8_backend: {keys.fp8_backend}: FP8 training with {FP8_LIBRARIES[backend][0]}")


@contextlib.contextmanager
def settings_of(keys: Fp8Config) -> Iterator[None]:
    """Sets the environment variables while a trainer is built, and restores them for later trainers."""
    backend = installed_backend(keys) if keys.fp8 else None
    settings = {}
    if backend is not None:
        gathers = str(keys.fp8_enable_fsdp_float8_all_gather).lower()
        settings = {_BACKEND: BACKENDS[backend], "ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER": gathers}
    before = {name: os.environ.pop(name, None) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def reason_against(machine: Machine) -> str:
    """Why this machine cannot train in FP8, or an empty string."""
    if machine.device != "cuda":
        return f"FP8 training needs an NVIDIA or AMD GPU, and this machine uses its {machine.device}"
    import torch

    if torch.version.hip is None and (found := torch.cuda.get_device_capability()) < NEEDED:
        return f"FP8 training needs compute capability 8.9 (Ada, Hopper) or later, not {found[0]}.{found[1]}"
    return ""
