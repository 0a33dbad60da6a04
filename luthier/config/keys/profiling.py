"""Keys of the profiler of PyTorch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilerConfig:
    enable_torch_profiler: bool = False
    """Record traces of some steps with torch.profiler, for Perfetto, chrome://tracing or TensorBoard."""
    profiler_output_dir: str | None = None
    """Folder for traces; unset means `profiler` in `output_dir`. Each process has a folder `rank_N` in it."""
    profiler_wait_steps: int = 1
    """Steps to skip before each trace."""
    profiler_warmup_steps: int = 1
    """Steps to warm the profiler up with."""
    profiler_active_steps: int = 1
    """Steps to record."""
    profiler_repeat: int = 1
    """Number of traces; 0 for no limit."""
    profiler_record_shapes: bool = True
    """Record the shapes of tensors."""
    profiler_profile_memory: bool = True
    """Record memory allocations."""
    profiler_with_stack: bool = True
    """Record the Python call stack."""
