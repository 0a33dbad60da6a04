"""The goals of speed and memory, measured in one run; the table in docs/benchmarks.md is written by this command.

    make bench                                             # everything, under 15 minutes on two cores
    python -m benchmarks.bench_goals --only dpo kto        # some measures, printed and not written

Luthier and the reference take their steps in turn, each in a process of its own (`benchmarks/goals/`). The reference is
written by hand with transformers.Trainer and peft and has the defaults of LLaMA-Factory; `make bench-peers` measures
the real programs.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.goals import answers, growth, inputs, startup, training
from benchmarks.goals.rows import Row, as_json, origin, table, write
from benchmarks.goals.training import Setting
from benchmarks.goals.turns import ProgramFailed

MEASURES: dict[str, Callable[[Setting], list[Row]]] = {
    **training.MEASURES,
    **answers.MEASURES,
    **startup.MEASURES,
    **growth.MEASURES,
}
NAME = "bench"
"""Of the comments around the table in docs/benchmarks.md."""


def failed(name: str, error: Exception) -> Row:
    """The row of a measure that could not be taken; the error goes to stderr in full."""
    print(f"{name}: {error}", file=sys.stderr, flush=True)
    return Row(name, "", "failed", note=str(error).splitlines()[0])


def run_all(names: list[str], setting: Setting, most_minutes: float) -> list[Row]:
    """A measure that fails leaves a row that says so. None begins after `most_minutes`."""
    end = time.monotonic() + 60 * most_minutes
    rows: list[Row] = []
    for name in names:
        if time.monotonic() > end:
            rows.append(Row(name, "", "not measured", note=f"{most_minutes:g} minutes were over"))
            continue
        start = time.monotonic()
        try:
            found = MEASURES[name](setting)
        except (ProgramFailed, subprocess.CalledProcessError, RuntimeError, AssertionError) as error:
            found = [failed(name, error)]
        rows += found
        for row in found:
            print(f"{row.measure}: {row.measured}; {row.memory or row.note}", file=sys.stderr)
        print(f"{name} took {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=None, help="measures to take, not written")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each program; one more warms up")
    parser.add_argument("--minutes", type=float, default=14, help="no measure begins after so many")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs.write_data(folder)
        setting = Setting(folder, inputs.model_folder(), inputs.teacher_folder, options.steps)
        rows = run_all(options.only or [*MEASURES], setting, options.minutes)
    text = f"{origin('make bench', (time.monotonic() - start) / 60, options.steps)}\n\n{table(rows)}"
    print(text)
    if options.json:
        options.json.write_text(json.dumps(as_json(rows), indent=2), encoding="utf-8")
    if options.only is None:
        write(NAME, text)
    return 1 if any(row.measured == "failed" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
