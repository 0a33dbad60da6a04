"""Keys of launchers: HyperParallel, which this version does not have, and those that environment variables set."""

from dataclasses import dataclass

from luthier.config.keys.fields import refused

_TORCHRUN = "start the run with torchrun (FORCE_TORCHRUN=1), with fsdp or deepspeed"
_BY_ENVIRONMENT = "an environment variable decides it"


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronSwitches:
    use_mca: bool = refused(False, _BY_ENVIRONMENT, "set USE_MCA=1 in the environment")
    """Train through mcore_adapter and Megatron-core."""
    use_megatron_bridge: bool = refused(False, _BY_ENVIRONMENT, "set USE_MEGATRON_BRIDGE=1 in the environment")
    """Train through Megatron-Bridge and Megatron-core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HyperParallelConfig:
    use_hyper_parallel: bool = refused(False, "HyperParallel is not part of this version", _TORCHRUN)
    """Train through HyperParallel."""
    hyper_parallel_args: str | None = None
    """JSON file with its settings."""
    hyper_parallel_cp_size: int = 1
    """Devices that share a sequence."""
