"""Callbacks: the log, the progress line, trackers, profilers. Each file in this folder is one of them."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import TrainerCallback

from luthier.training.arguments import trackers
from luthier.training.callbacks.early_stopping import EarlyStoppingCallback
from luthier.training.callbacks.module_profiler import ModuleProfiler
from luthier.training.callbacks.neftune import NeftuneNoise
from luthier.training.callbacks.plot_ends import PlotEnds
from luthier.training.callbacks.progress import ProgressBar
from luthier.training.callbacks.swanlab import swanlab_callbacks
from luthier.training.callbacks.torch_profiler import TorchProfiler
from luthier.training.callbacks.trainer_log import TrainerLog
from luthier.training.callbacks.warn_once import WarnOnce

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.stages import Stage


def callbacks_of(run: "TrainRun", stage: "Stage") -> list[TrainerCallback]:
    """The callbacks that the run's keys request."""
    output_dir = Path(run.training["output_dir"])
    overwrites = run.training["overwrite_output_dir"]
    log = TrainerLog(output_dir / "trainer_log.jsonl", overwrites=overwrites, trains=run.trains)
    callbacks: list[TrainerCallback] = [log, ProgressBar(stage.reporting.headline), *_trackers_of(run)]
    if stage.reporting.warns is not None:
        callbacks.append(WarnOnce(stage.reporting.warns))
    patience = run.finetuning.early_stopping_steps
    if run.finetuning.plot_loss and run.training["logging_strategy"] != "no":
        callbacks.append(PlotEnds(stops_early=patience is not None))
    if patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=patience))
    if run.profiler.enable_torch_profiler:
        folder = run.profiler.profiler_output_dir or output_dir / "profiler"
        callbacks.append(TorchProfiler(run.profiler, Path(folder)))
    if run.finetuning.profile_modules:
        callbacks.append(ModuleProfiler(run.finetuning.profile_modules))
    if run.training["neftune_noise_alpha"]:
        callbacks.append(NeftuneNoise(run.training["neftune_noise_alpha"]))
    return callbacks


def _trackers_of(run: "TrainRun") -> list[TrainerCallback]:
    """The trackers of `report_to`. With `use_swanlab`, SwanLab's own callback replaces that of transformers."""
    report_to = run.training["report_to"]
    if not run.swanlab.use_swanlab:
        return trackers(report_to)
    others = [name for name in ([report_to] if isinstance(report_to, str) else report_to or ()) if name != "swanlab"]
    return [*trackers(others), *swanlab_callbacks(run.swanlab, run.training["run_name"])]
