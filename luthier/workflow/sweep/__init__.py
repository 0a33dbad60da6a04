"""A sweep: every run of a grid, one after another, then one table and one plot.

    OUT/NAME/         an ordinary folder of `luthier train` for each run
    OUT/sweep.json    the runs with their values, metrics and errors; `sweep.md` and `sweep.png` show the same

The same command continues a sweep that was stopped or killed: runs that are done are not run again, the one that was
going on resumes from its checkpoint, and failed runs are tried again.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from luthier.config.sections import is_on
from luthier.core.errors import ConfigError, InvalidInput
from luthier.core.log import info, warn
from luthier.core.manifest import CONSOLE
from luthier.workflow.sweep.grid import GridRun, grid
from luthier.workflow.sweep.one_run import RunProcess, SignalsTo, error_of, problem_of, state_of
from luthier.workflow.sweep.table import Table, read_table


def sweep(words: Sequence[str]) -> tuple[Table, bool]:
    """Run the grid that the words of the command line describe. Returns its table, and whether a signal stopped it.

    Raises `ConfigError` with the faults of all runs before the first of them starts.
    """
    if "LOCAL_RANK" in os.environ:
        raise InvalidInput(
            "sweep: starts its runs itself -> start it without torchrun; FORCE_TORCHRUN=1 applies to each"
        )
    runs = grid(words)
    problems = [problem for one in runs if (problem := problem_of(one)) is not None]
    if problems:
        raise ConfigError(runs[0].run.source, problems)
    root = runs[0].folder.parent
    left = [one for one in runs if state_of(one.folder) != "done"]
    info(
        f"sweep: {len(runs)} runs in {root}"
        + (f", {len(runs) - len(left)} of them done" if len(left) < len(runs) else "")
    )
    if is_on(os.environ, "USE_RAY"):
        from luthier.workflow.sweep.tune import run_with_tune

        run_with_tune(left, root)
        was_stopped = any(state_of(one.folder) in ("waiting", "stopped") for one in runs)
    else:
        was_stopped = run_in_turn(left, runs, root)
    table = read_table(runs)
    table.save(root, plots=True)
    return table, was_stopped


def run_in_turn(left: Sequence[GridRun], runs: Sequence[GridRun], root: Path) -> bool:
    """Run those of `left`, one after another. Returns whether a signal stopped it."""
    for number, one in enumerate(left, start=1):
        info(f"run {number} of {len(left)}: {one.name} (its output: {one.folder / CONSOLE})")
        begin = time.monotonic()
        with RunProcess(one.folder, one.keys()) as process, SignalsTo(process.process) as signals:
            state = process.wait()
        seconds = time.monotonic() - begin
        table = read_table(runs)
        table.save(root, plots=False)
        if state == "failed":
            warn(f"{one.name} failed after {seconds:.0f} s: {error_of(one.folder)}")
        else:
            info(f"{one.name}: {state} after {seconds:.0f} s{table.remark(one.name)}")
        if signals.was_asked:
            info(f"stopped: {table.num_done} of {len(runs)} runs are done -> run the same command to go on")
            return True
    return False
