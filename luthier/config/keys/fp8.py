"""Keys of FP8 training, through accelerate."""

from dataclasses import dataclass
from typing import Literal

from luthier.core.versions import is_installed


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Config:
    fp8: bool = False
    """FP8 training: matrix products in 8-bit floating point, on a GPU that supports it (Ada, Hopper or later)."""
    fp8_backend: Literal["auto", "torchao", "te", "msamp"] = "auto"
    """Library for FP8 products: torchao, Transformer Engine (te), MS-AMP, or the first of them that is installed."""
    fp8_enable_fsdp_float8_all_gather: bool = False
    """Gather the weights that FSDP shards in 8 bits (torchao only)."""


FP8_LIBRARIES = {
    "torchao": ("torchao", "pip install torchao"),
    "te": ("transformer_engine", "pip install 'transformer-engine[pytorch]'"),
    "msamp": ("msamp", "see the documentation of MS-AMP"),
}
"""Value of `fp8_backend` -> its module and how to get it, best first."""


def installed_backend(keys: Fp8Config) -> str | None:
    """The best library that `fp8_backend` allows and that is installed, by its name there."""
    return next((name for name in _allowed(keys) if is_installed(FP8_LIBRARIES[name][0])), None)


def missing_library(keys: Fp8Config) -> tuple[str, str]:
    """The module, or the modules of which one is needed, and how to get the best."""
    names = _allowed(keys)
    return " or ".join(FP8_LIBRARIES[name][0] for name in names), FP8_LIBRARIES[names[0]][1]


def _allowed(keys: Fp8Config) -> list[str]:
    return list(FP8_LIBRARIES) if keys.fp8_backend == "auto" else [keys.fp8_backend]
