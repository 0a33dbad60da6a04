"""What `luthier eval` has left: its tables and its answers, and which evaluations are of a run.

An evaluation that the board starts has a folder of its own like every run; its save_dir is `results` in it.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from luthier.evals.results import COMPARISON_LOG, LINES_FILE, LOG_FILE, SUMMARY_FILE
from luthier.webui.runs import Run, read_object, shown_json

RESULTS = "results"
TABLES = (COMPARISON_LOG, LOG_FILE)
"""The first one that is there says the most."""
MAX_RECORDS = 50
MAX_TEXT_CHARS = 600


def words_for(folder: Path) -> tuple[str, ...]:
    """What follows the run file in the command of an evaluation in this folder."""
    return (f"save_dir={folder / RESULTS}",)


def tables_in(folder: Path) -> dict[str, str]:
    """Name of the task -> its table; the name is empty for a single task or a comparison of several."""
    root = folder / RESULTS
    for name in TABLES:
        if os.path.isfile(root / name):
            return {"": _read(root / name)}
    return {path.parent.name: _read(path) for path in sorted(root.glob(f"*/{TABLES[1]}"))}


def records_in(folder: Path) -> list[list[str]]:
    """The first records: subject, number, and what the model made of the question."""
    root = folder / RESULTS
    files = [root / LINES_FILE] if os.path.isfile(root / LINES_FILE) else sorted(root.glob(f"*/{LINES_FILE}"))
    return [row for file in files for row in islice(_rows(file), MAX_RECORDS // len(files))]


def evaluations_of(folder: Path, runs: Sequence[Run]) -> list[Run]:
    """Those of the finished evaluations among `runs` that measured what is in this folder."""
    return [run for run in runs if run.folder != folder and folder in _models(run.folder)]


def _models(folder: Path) -> set[Path]:
    """The models and adapters of an evaluation, as folders."""
    summary = read_object(folder / RESULTS / SUMMARY_FILE)
    tasks = summary.get("tasks")
    found = set()
    for one in tasks.values() if isinstance(tasks, dict) else [summary]:
        if not isinstance(one, dict):
            continue
        adapters = one.get("adapters")
        for name in (one.get("model"), *(adapters if isinstance(adapters, list) else ())):
            if isinstance(name, str) and name and "\0" not in name:
                found.add(Path(os.path.realpath(name)))
    return found


def _rows(file: Path) -> Iterator[list[str]]:
    with suppress(OSError), file.open(encoding="utf-8", errors="replace") as lines:  # it may go at any moment
        for line in lines:
            try:
                record = shown_json(line.encode())
            except (ValueError, RecursionError):  # half of a line
                continue
            if not isinstance(record, dict):
                continue
            rest = {name: value for name, value in record.items() if name not in ("subject", "index")}
            shown = "\n".join(f"{name}: {_shown(value)}" for name, value in rest.items())
            yield [str(record.get("subject", "")), str(record.get("index", "")), shown]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MAX_TEXT_CHARS else f"{text[:MAX_TEXT_CHARS]} …"


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").rstrip()
    except OSError:  # it may go at any moment
        return ""
