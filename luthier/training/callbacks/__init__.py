"""Callbacks: the log, the progress line, trackers, profilers. Each other file here is one of them."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import EarlyStoppingCallback, TrainerCallback

from luthier.training.arguments import trackers
from luthier.training.callbacks.module_profiler import ModuleProfiler
from luthier.training.callbacks.neftune import NeftuneNoise
from luthier.training.callbacks.progress import ProgressBar
from luthier.training.callbacks.swanlab import swanlab_callbacks
from luthier.training.callbacks.torch_profiler import TorchProfiler
from luthier.training.callbacks.trainer_log import TrainerLog

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.stages import Stage


def callbacks_of(run: "TrainRun", stage: "Stage") -> list[TrainerCallback]:
    """Those that the keys of the run ask for."""
    output_dir = Path(run.training["output_dir"])
    log = TrainerLog(output_dir / "trainer_log.jsonl", starts_anew=run.training["overwrite_output_dir"])
    callbacks: list[TrainerCallback] = [log, ProgressBar(stage.reporting.headline), *_trackers_of(run)]
    if run.finetuning.early_stopping_steps is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=run.finetuning.early_stopping_steps))
    if run.profiler.enable_torch_profiler:
        folder = run.profiler.profiler_output_dir or output_dir / "profiler"
        callbacks.append(TorchProfiler(run.profiler, Path(folder)))
    if run.finetuning.profile_modules:
        callbacks.append(ModuleProfiler(run.finetuning.profile_modules))
    if run.training["neftune_noise_alpha"]:
        callbacks.append(NeftuneNoise(run.training["neftune_noise_alpha"]))
    return callbacks


def _trackers_of(run: "TrainRun") -> list[TrainerCallback]:
    """Those of `report_to`; with the keys of SwanLab its own callback takes the place of the plain one."""
    asked = run.training["report_to"]
    if not run.swanlab.use_swanlab:
        return trackers(asked)
    others = [name for name in ([asked] if isinstance(asked, str) else asked or ()) if name != "swanlab"]
    return [*trackers(others), *swanlab_callbacks(run.swanlab, run.training["run_name"])]
