"""Keys of launchers that this version does not have: Megatron and HyperParallel."""

from dataclasses import dataclass
from typing import Literal

from luthier.config.keys.fields import refused

_TORCHRUN = "start the run with torchrun (FORCE_TORCHRUN=1), with fsdp or deepspeed"


@dataclass(frozen=True, slots=True, kw_only=True)
class McaConfig:
    use_mca: bool = refused(False, "Megatron-core is not part of this version", _TORCHRUN)
    """Train through mcore_adapter; the reference sets it from USE_MCA."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperParallelConfig:
    use_hyper_parallel: bool = refused(False, "HyperParallel is not part of this version", _TORCHRUN)
    """Train through HyperParallel."""
    hyper_parallel_args: str | None = None
    """JSON file with its settings."""
    hyper_parallel_cp_size: int = 1
    """Devices that share a sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronBridgeConfig:
    use_megatron_bridge: bool = refused(False, "Megatron-Bridge is not part of this version", _TORCHRUN)
    """Train through Megatron-Bridge; the reference sets it from USE_MEGATRON_BRIDGE."""
    tensor_model_parallel_size: int = 1
    """Devices that share each layer."""
    pipeline_model_parallel_size: int = 1
    """Devices that hold different layers."""
    expert_model_parallel_size: int = 1
    """Devices that share the experts."""
    context_parallel_size: int = 1
    """Devices that share each sequence."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Pieces of the model per pipeline device."""
    sequence_parallel: bool = False
    """Also split activations between those layers by sequence."""
    recompute_granularity: str | None = None
    """What is recomputed in the backward pass: full or selective."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Which layers are recomputed."""
    recompute_num_layers: int | None = None
    """How many layers at a time."""
    account_for_embedding_in_pipeline_split: bool | None = None
    """Count the embedding as a layer when layers are assigned to stages."""
    account_for_loss_in_pipeline_split: bool | None = None
    """Count the loss as a layer when layers are assigned to stages."""
    bias_activation_fusion: bool | None = None
    """One kernel for bias and activation."""
    apply_rope_fusion: bool | None = None
    """One kernel for the rotary embedding."""
    masked_softmax_fusion: bool | None = None
    """One kernel for mask and softmax."""
    cross_entropy_loss_fusion: bool | None = None
    """One kernel for the loss."""
    moe_grouped_gemm: bool | None = None
    """One kernel for all experts."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] | None = None
    """How tokens travel to their experts."""
    calculate_per_token_loss: bool | None = None
    """Divide the loss by the number of tokens."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state."""
    overlap_param_gather: bool = True
    """Fetch weights while computing."""
    overlap_grad_reduce: bool = True
    """Add gradients up while computing."""
    use_packed_sequences: bool = False
    """Pack rows of sft."""
    mixed_precision: str = "bf16_mixed"
    """Name of the precision recipe."""
    megatron_pretrained_checkpoint: str | None = None
    """Megatron weights to start from."""
    export_hf_on_finish: bool = False
    """Write Hugging Face weights at the end."""
    extra_config: str | None = None
    """More settings, as JSON text or file."""
