"""Keys that measure where the time goes."""

from dataclasses import dataclass

from luthier.config.fields import refused


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfilerConfig:
    enable_torch_profiler: bool = refused(False, "profiling a run is not part of this version", "leave it out")
    """Record a trace with torch.profiler."""
    profiler_output_dir: str | None = None
    """Folder for traces; unset means `profiler` in `output_dir`."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleProfilerConfig:
    profile_modules: tuple[str, ...] = refused((), "timing modules is not part of this version", "leave it out")
    """Patterns of module names whose passes are timed."""
