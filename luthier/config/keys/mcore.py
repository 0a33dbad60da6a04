"""Keys of Megatron-core, as mcore_adapter and Megatron-Bridge name them."""

from dataclasses import dataclass
from typing import Any, Literal

SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
)
"""How many processes one copy of the model is cut into, each way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronConfig:
    """What both libraries read."""

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
    recompute_granularity: Literal["full", "selective"] | None = None
    """What is recomputed in the backward pass: whole layers or the attention alone."""
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
    cross_entropy_loss_fusion: bool | None = None
    """One kernel for the loss."""
    moe_grouped_gemm: bool | None = None
    """One kernel for all experts."""
    moe_token_dispatcher_type: Literal["allgather", "alltoall", "flex"] | None = None
    """How tokens travel to their experts."""
    calculate_per_token_loss: bool | None = None
    """Divide the loss by the number of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class McoreConfig(MegatronConfig):
    """Read with USE_MCA=1."""

    use_distributed_optimizer: bool = False
    """Shard the optimizer state."""
    overlap_param_gather: bool = False
    """Fetch weights while computing."""
    overlap_grad_reduce: bool = False
    """Add gradients up while computing."""
    expert_tensor_parallel_size: int | None = None
    """Devices that share each expert."""
    pipeline_model_parallel_layout: str | None = None
    """Which layers each pipeline stage has, e.g. `E,t*3|t*4,L`: embedding, layers, loss."""
    overlap_p2p_comm: bool = True
    """Exchange activations between pipeline stages while computing; with virtual pipeline stages only."""
    variable_seq_lengths: bool = False
    """Let the batches of a step have different lengths between pipeline stages."""
    recompute_modules: str | None = None
    """What `recompute_granularity: selective` recomputes, separated by commas: core_attn, mlp, moe, layernorm, ..."""
    moe_layer_recompute: bool = False
    """Recompute the layers of experts."""
    moe_aux_loss_coeff: float | None = None
    """Weight of the loss that balances experts."""
    moe_expert_capacity_factor: float | None = None
    """Capacity of each expert; unset drops no token."""
    moe_pad_expert_input_to_capacity: bool | None = None
    """Pad the input of each expert to its capacity."""
    moe_token_drop_policy: Literal["probs", "position"] | None = None
    """Which tokens are dropped beyond the capacity."""
    moe_shared_expert_overlap: bool = False
    """Compute shared experts while tokens travel."""
    moe_router_dtype: str | None = None
    """Number format of the router: fp32 or fp64."""
    mtp_num_layers: int | None = None
    """Number of layers that predict tokens further ahead."""
    transformer_impl: Literal["local", "transformer_engine"] | None = None
    """Whose layers compute."""
    accumulate_allreduce_grads_in_fp32: bool = False
    """Add gradients up in float32; always done with bf16."""
    distrib_optim_fully_reshardable: bool = False
    """Save the state of the optimizer so that any number of devices can load it."""
    delay_grad_reduce: bool = True
    """Delay adding gradients up in all pipeline stages but the first."""
    check_for_nan_in_loss_and_grad: bool = True
    """Stop at a loss or a gradient that is NaN."""
    ddp_average_in_collective: bool = False
    """Average gradients while they are added up."""
    ddp_bucket_size: int | None = None
    """Largest number of parameters whose gradients are added up together."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """The optimizer of Megatron-core; `optim` is not read."""
    optimizer_cpu_offload: bool = False
    """Hold the state of the optimizer in the memory of the CPU and compute there."""
    optimizer_offload_fraction: float = 0.0
    """The share of it."""
    ckpt_format: Literal["legacy", "torch_dist"] = "legacy"
    """How checkpoints are written."""
    save_hf_model: bool = False
    """Save each checkpoint in the format of Hugging Face too; the final weights are in that format always."""
    additional_configs: dict[str, Any] | None = None
    """More settings of Megatron-core's TransformerConfig, as a mapping or JSON text."""
