"""`luthier train RUN`: train, evaluate and predict as the run file says."""

import os

from luthier.config.runs import TrainRun
from luthier.config.sections import is_on
from luthier.core.log import is_main_process
from luthier.core.signals import ending_on_signals


def main(argv: list[str]) -> int:
    with ending_on_signals():
        return _train(argv)


def _train(argv: list[str]) -> int:
    from luthier.config.load import read_source
    from luthier.training.distributed.peers import watched
    from luthier.workflow.launch.torchrun import end_with_launcher, launch_if_needed
    from luthier.workflow.preflight import load_checked
    from luthier.workflow.training import train

    end_with_launcher()
    run = load_checked("train", read_source(argv), begins=True)
    assert isinstance(run, TrainRun)
    if is_on(os.environ, "USE_RAY"):
        from luthier.workflow.launch.ray import train_with_ray

        done = train_with_ray(run)
        print(done.printed, end="")
        return done.status
    status = launch_if_needed(argv)
    if status is not None:
        return status
    with watched():
        result = train(run)
    if result.was_interrupted:
        return 130
    if is_main_process():
        from luthier.workflow.plan.foresight import comparison

        for metrics in result.metrics.values():
            for name, value in metrics.items():
                print(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
        for line in comparison(result.compared):
            print(line)
        print(f"saved: {result.output_dir}")
    return 0
