"""One measured program in this process: `python -m benchmarks.goals.child PROGRAM WORK`.

PROGRAM is a name of `PROGRAMS`, WORK a JSON file: `keys`, those of the run file, `rows`, the file of token ids for
programs that do not tokenize themselves, and `settings`, what only some programs read.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.goals.clock import Clock

PROGRAMS = {
    "luthier": "benchmarks.goals.luthier_program",
    "reference": "benchmarks.goals.reference",
    "peak": "benchmarks.goals.machine_peak",
    "reference-answers": "benchmarks.goals.answer_programs:run_reference",
    "luthier-answers": "benchmarks.goals.answer_programs:run_luthier",
    "llamafactory": "benchmarks.peers.llamafactory_program",
    "trl": "benchmarks.peers.trl_program",
}
"""Name -> module with `run(work, clock)`, or module:function. The peers are imported in environments of their own."""


@dataclass(frozen=True, slots=True)
class Work:
    keys: dict[str, Any]
    """Of the run file."""
    rows: str = ""
    """A file with the token ids of its rows."""
    settings: dict[str, Any] | None = None
    """What one program alone reads."""

    def setting(self, name: str, default: Any = None) -> Any:
        return (self.settings or {}).get(name, default)

    def token_rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(self.rows).read_text(encoding="utf-8").splitlines()]


def main(program: str, work_file: str) -> None:
    work = Work(**json.loads(Path(work_file).read_text(encoding="utf-8")))
    clock = Clock()
    module, _, function = PROGRAMS[program].partition(":")
    run: Callable[[Work, Clock], None] = getattr(import_module(module), function or "run")
    run(work, clock)
    clock.finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
