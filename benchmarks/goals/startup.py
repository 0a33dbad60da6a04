"""CPU seconds before the work begins: the rows of `make bench-startup` that have a goal here, fewer times."""

import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from benchmarks import bench_startup
from benchmarks.goals.rows import Row

if TYPE_CHECKING:
    from benchmarks.goals.training import Setting

COMMANDS = ("data", "template check", "plan", "chat, first line", "train, first step")
NUM_RUNS = 3


def measure(setting: "Setting") -> list[Row]:
    folder = setting.folder / "startup"
    folder.mkdir()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ.setdefault("LUTHIER_CACHE", str(folder / "cache"))
    known = bench_startup.commands_in(folder)
    works: dict[str, Callable[[], float]] = {
        name: partial(bench_startup.cpu_seconds, ["-m", "luthier", *known[name][0]], known[name][1])
        for name in COMMANDS
        if name in known
    }
    works["train, first step"] = partial(bench_startup.seconds_to_first_step, folder / "small.yaml")
    rows = []
    for name in COMMANDS:
        works[name]()  # compiles bytecode and fills the cache
        seconds = sorted(works[name]() for _ in range(NUM_RUNS))
        measured = f"{statistics.median(seconds):.2f} s ({seconds[0]:.2f} to {seconds[-1]:.2f})"
        remark = "less `import torch` alone" if name.startswith("train") else ""
        rows.append(Row(f"CPU seconds of `{name}`", f"{bench_startup.TARGETS[name]} s", measured, note=remark))
    return rows


MEASURES: dict[str, Callable[["Setting"], list[Row]]] = {"startup": measure}
