"""torch.profiler traces of some steps, one file per trace, for Perfetto, chrome://tracing or TensorBoard."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from luthier.core.log import info, warn

if TYPE_CHECKING:
    from luthier.config.keys.profiling import ProfilerConfig


class TorchProfiler(TrainerCallback):
    """Every process writes to its own folder, `rank_N`."""

    def __init__(self, config: "ProfilerConfig", folder: Path) -> None:
        self.config, self.folder = config, folder
        self.profiler: torch.profiler.profile | None = None
        self.num_traces = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        config = self.config
        self.folder = self.folder / f"rank_{args.process_index}"
        write = torch.profiler.tensorboard_trace_handler(str(self.folder))

        def keep(profiler: torch.profiler.profile) -> None:
            write(profiler)
            self.num_traces += 1
            info(f"trace of step {state.global_step}: {self.folder}")

        self.profiler = torch.profiler.profile(
            schedule=torch.profiler.schedule(
                wait=config.profiler_wait_steps,
                warmup=config.profiler_warmup_steps,
                active=config.profiler_active_steps,
                repeat=config.profiler_repeat,
            ),
            on_trace_ready=keep,
            record_shapes=config.profiler_record_shapes,
            profile_memory=config.profiler_profile_memory,
            with_stack=config.profiler_with_stack,
        )
        self.profiler.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is not None:
            self.profiler.step()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.profiler is None:
            return
        self.profiler.stop()
        self.profiler = None
        if not self.num_traces:
            config = self.config
            needed = config.profiler_wait_steps + config.profiler_warmup_steps + config.profiler_active_steps
            warn(f"enable_torch_profiler: the run ended before the {needed} steps that a trace needs")
