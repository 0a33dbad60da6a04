"""A run of luthier whose steps are taken in turns."""

import time
from typing import TYPE_CHECKING, Any

from benchmarks.goals.clock import watch_trainer

if TYPE_CHECKING:
    from benchmarks.goals.child import Work
    from benchmarks.goals.clock import Clock


def run(work: "Work", clock: "Clock") -> None:
    import luthier
    from luthier.training.reference_logps import ReferenceScorer

    watch_trainer(clock)
    seconds_of_scoring = 0.0
    add_to = ReferenceScorer.add_to

    def timed(scorer: ReferenceScorer, row_sets: Any) -> Any:
        nonlocal seconds_of_scoring
        start = time.perf_counter()
        scored = add_to(scorer, row_sets)
        seconds_of_scoring += time.perf_counter() - start
        return scored

    ReferenceScorer.add_to = timed  # type: ignore[method-assign, assignment]
    result = luthier.train(work.keys)
    clock.facts["seconds_of_scoring"] = seconds_of_scoring
    clock.facts["plan"] = dict(result.compared)
