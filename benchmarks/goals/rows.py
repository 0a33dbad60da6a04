"""Measures as rows of a table, and the table in docs/benchmarks.md."""

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "hqq", "trl")


@dataclass(frozen=True, slots=True)
class Row:
    measure: str
    goal: str
    measured: str
    seconds: str = ""
    """Of a step: reference, then luthier."""
    memory: str = ""
    """Peak: reference, then luthier."""
    note: str = ""

    def cells(self) -> list[str]:
        return [" ".join(str(value).replace("|", "/").split()) for value in asdict(self).values()]


HEADINGS = ("measure", "goal", "measured", "seconds a step", "peak memory", "remarks")


def table(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells() for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def between(text: str, name: str, new: str) -> str:
    """`text` with what stands between the comments of this name replaced. Raises `ValueError` if they are missing."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    head, found, rest = text.partition(begin)
    _, closed, tail = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"the page has no comments {begin} and {end} -> put them where the table belongs")
    return f"{head}{begin}\n{new}\n{end}{tail}"


def write(name: str, new: str, page: Path = PAGE) -> None:
    page.write_text(between(page.read_text(encoding="utf-8"), name, new), encoding="utf-8")


def processor() -> str:
    """Its name as the system gives it, with the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line]
        name = names[0] if names else name
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {num_cores} cores"


def installed(names: Sequence[str] = LIBRARIES) -> str:
    """The versions of these libraries, as far as they are installed."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def installed_in(python: str, names: Sequence[str]) -> str:
    """The same for another interpreter."""
    code = f"from benchmarks.goals.rows import installed; print(installed({tuple(names)!r}))"
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=root)
    return done.stdout.strip()


def origin(command: str, minutes: float, num_steps: int) -> str:
    """Where the figures come from, as a paragraph."""
    return (
        f"Written by `{command}` on {date.today().isoformat()} in {minutes:.0f} minutes: {processor()}; Python"
        f" {platform.python_version()} on {sys.platform}, {installed()}. Medians of {num_steps} steps after one that"
        " warms up, smallest and largest in brackets."
    )


def gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def worst_difference(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of two lists of losses. Raises `ValueError` if one is longer."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
