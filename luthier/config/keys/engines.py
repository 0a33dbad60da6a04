"""Keys of the inference engines vLLM and SGLang, which run as servers of their own beside luthier."""

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmConfig:
    vllm_maxlen: int = 4096
    """Longest prompt plus answer, in tokens; the model's own limit holds if it is lower."""
    vllm_gpu_util: float = 0.7
    """Share of the memory of each device that vLLM takes."""
    vllm_enforce_eager: bool = False
    """Run without CUDA graphs: starts faster, answers slower."""
    vllm_max_lora_rank: int = 32
    """Largest rank of an adapter: 1, 8, 16, 32, 64, 128, 256, 320 or 512."""
    vllm_config: dict[str, Any] | None = None
    """More options of `vllm serve`, as a mapping or JSON text: `{max_num_seqs: 64}` is `--max-num-seqs 64`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangConfig:
    sglang_maxlen: int = 4096
    """Longest prompt plus answer, in tokens; the model's own limit holds if it is lower."""
    sglang_mem_fraction: float = 0.7
    """Share of the memory of each device for weights and KV cache."""
    sglang_tp_size: int = -1
    """Devices that share each layer; -1 for all."""
    sglang_config: dict[str, Any] | None = None
    """More options of `sglang serve`, as a mapping or JSON text; `false` leaves an option out."""
    sglang_lora_backend: Literal["triton", "flashinfer"] = "triton"
    """Kernels for adapters. Current versions of SGLang have no flashinfer."""
