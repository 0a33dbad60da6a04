"""Keys of the profiler of PyTorch."""

from dataclasses import dataclass

from luthier.config.rules.engine import Rules, at_least


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilerConfig:
    enable_torch_profiler: bool = False
    """Record traces of some steps with torch.profiler, for Perfetto, chrome://tracing or TensorBoard."""
    profiler_output_dir: str | None = None
    """Folder for traces; unset means `profiler` in `output_dir`. Each process has a folder `rank_N` in it."""
    profiler_wait_steps: int = 1
    """Steps to leave out before each trace."""
    profiler_warmup_steps: int = 1
    """Steps to warm the profiler up with."""
    profiler_active_steps: int = 1
    """Steps to record."""
    profiler_repeat: int = 1
    """Number of traces; 0 for no end."""
    profiler_record_shapes: bool = True
    """Record the shapes of tensors."""
    profiler_profile_memory: bool = True
    """Record memory."""
    profiler_with_stack: bool = True
    """Record the lines of Python."""


PROFILER_RULES = Rules(
    (
        at_least("profiler", "profiler_wait_steps", 0),
        at_least("profiler", "profiler_warmup_steps", 0),
        at_least("profiler", "profiler_active_steps", 1),
        at_least("profiler", "profiler_repeat", 0),
    )
)
