"""Which callbacks the keys of a run ask for."""

import pytest

from luthier.config.load import load_train
from luthier.core.kinds import STAGES
from luthier.training.callbacks import callbacks_of

RUN = {"model_name_or_path": "m", "dataset": "d", "do_train": True, "output_dir": "out"}
ALWAYS = ["TrainerLog", "ProgressBar"]


@pytest.mark.parametrize(
    ("keys", "more"),
    [
        ({}, []),
        ({"neftune_noise_alpha": 5.0}, ["NeftuneNoise"]),
        ({"profile_modules": "q_proj"}, ["ModuleProfiler"]),
        ({"enable_torch_profiler": True}, ["TorchProfiler"]),
        (
            {"early_stopping_steps": 3, "val_size": 0.1, "eval_strategy": "steps", "eval_steps": 5},
            ["EarlyStoppingCallback"],
        ),
        ({"plot_loss": True}, ["PlotEnds"]),
        ({"plot_loss": True, "logging_strategy": "no"}, []),
        ({"report_to": "tensorboard"}, ["TensorBoardCallback"]),
    ],
)
def test_each_key_adds_its_own(keys, more):
    run = load_train({**RUN, **keys})
    assert [type(callback).__name__ for callback in callbacks_of(run, STAGES.get("sft"))] == [*ALWAYS, *more]


def test_the_progress_bar_shows_the_headline_of_the_stage():
    bar = callbacks_of(load_train({**RUN, "stage": "dpo"}), STAGES.get("dpo"))[1]
    assert bar.headline == STAGES.get("dpo").reporting.headline


def test_a_stage_that_warns_of_its_log_is_watched():
    names = [type(callback).__name__ for callback in callbacks_of(load_train(RUN), STAGES.get("grpo"))]
    assert names == [*ALWAYS, "WarnOnce"]
