"""Keys of the inference engines vLLM and SGLang."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmConfig:
    vllm_maxlen: int = 4096
    """Longest prompt plus answer, in tokens."""
    vllm_gpu_util: float = 0.7
    """Share of the device memory that vLLM takes."""
    vllm_enforce_eager: bool = False
    """Run without CUDA graphs."""
    vllm_max_lora_rank: int = 32
    """Largest rank of an adapter."""
    vllm_config: dict[str, Any] | None = None
    """More arguments of the vLLM engine, as a mapping or JSON text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangConfig:
    sglang_maxlen: int = 4096
    """Longest prompt plus answer, in tokens."""
    sglang_mem_fraction: float = 0.7
    """Share of the device memory that SGLang takes."""
    sglang_tp_size: int = -1
    """Devices that share each layer; -1 for all."""
    sglang_config: dict[str, Any] | None = None
    """More arguments of the SGLang server, as a mapping or JSON text; the reference never uses it."""
    sglang_lora_backend: Literal["triton", "flashinfer"] = "triton"
    """Kernels for adapters."""
