"""Keys of launchers that this version does not have: Megatron-Bridge and HyperParallel."""

from dataclasses import dataclass

from luthier.config.keys.fields import refused
from luthier.config.keys.mcore import MegatronConfig

_TORCHRUN = "start the run with torchrun (FORCE_TORCHRUN=1), with fsdp or deepspeed"


@dataclass(frozen=True, slots=True, kw_only=True)
class McaConfig:
    use_mca: bool = refused(False, "an environment variable decides it", "set USE_MCA=1 in the environment")
    """Train through mcore_adapter and Megatron-core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperParallelConfig:
    use_hyper_parallel: bool = refused(False, "HyperParallel is not part of this version", _TORCHRUN)
    """Train through HyperParallel."""
    hyper_parallel_args: str | None = None
    """JSON file with its settings."""
    hyper_parallel_cp_size: int = 1
    """Devices that share a sequence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronBridgeConfig(MegatronConfig):
    use_megatron_bridge: bool = refused(False, "Megatron-Bridge is not part of this version", _TORCHRUN)
    """Train through Megatron-Bridge; the reference sets it from USE_MEGATRON_BRIDGE."""
    use_distributed_optimizer: bool = True
    """Shard the optimizer state."""
    overlap_param_gather: bool = True
    """Fetch weights while computing."""
    overlap_grad_reduce: bool = True
    """Add gradients up while computing."""
    masked_softmax_fusion: bool | None = None
    """One kernel for mask and softmax."""
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
