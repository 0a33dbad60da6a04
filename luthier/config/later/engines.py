"""Keys of the inference engines vLLM, SGLang and KTransformers."""

from dataclasses import dataclass
from typing import Any, Literal

from luthier.config.fields import refused


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmConfig:
    vllm_maxlen: int = 4096
    """Longest prompt and answer together, in tokens."""
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
    """Longest prompt and answer together, in tokens."""
    sglang_mem_fraction: float = 0.7
    """Share of the device memory that SGLang takes."""
    sglang_tp_size: int = -1
    """Devices that share each layer; -1 for all."""
    sglang_config: dict[str, Any] | None = None
    """More arguments of the SGLang server, as a mapping or JSON text; the reference never uses it."""
    sglang_lora_backend: Literal["triton", "flashinfer"] = "triton"
    """Kernels for adapters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KTransformersConfig:
    use_kt: bool = refused(
        False,
        "KTransformers trains through its own copies of transformers and accelerate, which cannot be installed beside"
        " the ones needed here",
        "leave it out, and see quantization_bit and use_unsloth_gc for models that do not fit into memory",
    )
    """Run the experts of a mixture-of-experts model on the CPU."""
    kt_cpu_activation: Literal["retain", "recompute"] | None = None
    """Keep the activations of those experts, or compute them again."""
    kt_weight_path: str | None = None
    """INT8 weights of the experts."""
    kt_non_expert_weight_path: str | None = None
    """BF16 weights of everything else."""
    kt_expert_checkpoint_path: str | None = None
    """Weights of the experts to be converted while loading."""
    kt_use_lora_experts: bool | None = None
    """Add adapters as experts on the accelerator."""
    kt_lora_expert_num: int | None = None
    """Number of those experts."""
    kt_lora_expert_intermediate_size: int | None = None
    """Width of those experts."""
    kt_config: dict[str, Any] | None = None
    """More settings of KTransformers."""
