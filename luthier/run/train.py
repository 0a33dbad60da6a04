"""`luthier train RUN`: train, evaluate and predict as the run file says."""

from luthier.config.runs import TrainRun
from luthier.core.log import is_main_process


def main(argv: list[str]) -> int:
    from luthier.config.load import read_source
    from luthier.training.peers import watched
    from luthier.workflow.launch import end_with_launcher, launch_if_needed
    from luthier.workflow.preflight import load_checked
    from luthier.workflow.training import train

    end_with_launcher()
    run = load_checked("train", read_source(argv), begins=True)
    assert isinstance(run, TrainRun)
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
