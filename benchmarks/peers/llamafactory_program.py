"""A run of LLaMA-Factory in its own environment, with the same run file, whose steps are taken in turns."""

from typing import TYPE_CHECKING

from benchmarks.goals.clock import watch_trainer

if TYPE_CHECKING:
    from benchmarks.goals.child import Work
    from benchmarks.goals.clock import Clock


def run(work: "Work", clock: "Clock") -> None:
    from llamafactory.train.tuner import run_exp

    watch_trainer(clock)
    # Without it transformers refuses bf16 on a machine that has no GPU.
    run_exp({**work.keys, "use_cpu": True})
