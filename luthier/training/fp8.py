"""Products of matrices in 8-bit floating point: what accelerate needs to know before the trainer is built.

accelerate swaps the linear layers when it prepares the model: all but the first and the last, and those whose sizes
16 does not divide. Weights and everything else stay as they are, so what is saved is an ordinary model. It takes its
settings from `ACCELERATE_FP8_*` variables, for TrainingArguments has no key for them.
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
"""As accelerate calls them."""
_BACKEND = "ACCELERATE_FP8_BACKEND"
NEEDED = (8, 9)
"""Compute capability of the first GPUs with 8-bit floating point (Ada); Hopper has 9.0."""


def switch_on(args: "TrainingArguments", keys: Fp8Config, machine: Machine) -> None:
    """Raises `InvalidInput` on a machine without 8-bit floating point, `MissingExtra` without a library for it."""
    lack = reason_against(machine)
    if lack:
        raise InvalidInput(f"fp8: true: {lack} -> leave fp8 out; bf16: true stays")
    backend = installed_backend(keys)
    if backend is None:
        modules, remedy = missing_library(keys)
        raise MissingExtra(f"fp8: true: needs the library {modules}, which is not installed -> {remedy}")
    args.mixed_precision = "fp8"
    info(f"fp8_backend: {keys.fp8_backend}: {FP8_LIBRARIES[backend][0]} multiplies matrices in 8-bit floating point")


@contextlib.contextmanager
def settings_of(keys: Fp8Config) -> Iterator[None]:
    """Around the building of a trainer, which takes them; later ones in this process must not find them."""
    backend = installed_backend(keys) if keys.fp8 else None
    told = {}
    if backend is not None:
        gathers = str(keys.fp8_enable_fsdp_float8_all_gather).lower()
        told = {_BACKEND: BACKENDS[backend], "ACCELERATE_FP8_ENABLE_FSDP_FLOAT8_ALL_GATHER": gathers}
    before = {name: os.environ.pop(name, None) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


def reason_against(machine: Machine) -> str:
    """What keeps this machine from it, or the empty text."""
    if machine.device != "cuda":
        return f"8-bit floating point needs a GPU of NVIDIA or AMD, and this machine computes on its {machine.device}"
    import torch

    if torch.version.hip is None and (found := torch.cuda.get_device_capability()) < NEEDED:
        return f"8-bit floating point needs compute capability 8.9 (Ada, Hopper), not {found[0]}.{found[1]}"
    return ""
