"""The folder `save_dir`: one line for each question while they are answered, and the results when all are.

run.json        the keys and the hashes of this evaluation; unfinished results go on only under the same
results.jsonl   {"subject": ..., "index": ..., ...} for each question, in order
results.json    as LLaMA-Factory writes it; for multiple choice {subject: {index: letter}}
results.log     the table that is also printed
summary.json    n, metrics, standard errors, versions, hashes; it is written last, so it marks finished results
base/           the same of the base, with `compare: base`
comparison.*    the report of a comparison, as data and as the table that is also printed
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luthier.core.drafts import is_draft, remove_abandoned
from luthier.core.errors import OutputError, RunFailed
from luthier.core.files import write_atomically
from luthier.evals.task import Record

RUN_FILE, LINES_FILE, RESULTS_FILE = "run.json", "results.jsonl", "results.json"
LOG_FILE, SUMMARY_FILE, BASE_FOLDER = "results.log", "summary.json", "base"
COMPARISON_FILE, COMPARISON_LOG = "comparison.json", "comparison.log"


class ResultsFolder:
    """Where results go. Without a folder they are only kept in memory."""

    def __init__(self, folder: Path | None, identity: Mapping[str, Any], *, reuses: bool = False) -> None:
        """`identity`: what must be the same for unfinished results to go on. `reuses`: finished ones are taken too.

        Raises `OutputError` for a folder that holds anything else than unfinished results with this identity.
        """
        self.folder = folder
        self.records: list[Record] = []
        """Those so far, in order."""
        if folder is not None:
            self._open(folder, json.loads(json.dumps(identity)), reuses)

    @property
    def is_finished(self) -> bool:
        return self.folder is not None and (self.folder / SUMMARY_FILE).exists()

    def _open(self, folder: Path, identity: Any, reuses: bool) -> None:
        if folder.is_dir():
            remove_abandoned(folder)
        if folder.exists() and (not folder.is_dir() or any(map(_is_own, folder.iterdir()))):
            require_same(folder, identity, reuses=reuses)
            self.records = read_records(folder)
        else:
            write_atomically(folder / RUN_FILE, json.dumps(identity, indent=2, ensure_ascii=False) + "\n")

    def keep_groups(self, size: int, total: int) -> None:
        """Forget the records of a group that is not whole, since the questions of a group are answered together.

        `total`: the number of questions, of which the last group may have fewer than `size`.
        """
        if len(self.records) < total:
            self.records = self.records[: len(self.records) - len(self.records) % size]
        if self.folder is not None:
            write_atomically(self.folder / LINES_FILE, "".join(map(_line, self.records)))

    def add(self, records: Sequence[Record]) -> None:
        """Write these records at once, so that a run that is killed has them."""
        self.records += records
        if self.folder is None:
            return
        try:
            with (self.folder / LINES_FILE).open("a", encoding="utf-8") as file:
                file.write("".join(map(_line, records)))
                file.flush()
                os.fsync(file.fileno())
        except OSError as fault:
            raise RunFailed(f"{self.folder / LINES_FILE}: it cannot be written ({fault.strerror or fault})") from fault

    def finish(self, results: Any, log: str, summary: Mapping[str, Any]) -> None:
        """Write the results of all records."""
        if self.folder is None:
            return
        write_atomically(self.folder / RESULTS_FILE, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
        write_atomically(self.folder / LOG_FILE, log + "\n")
        write_atomically(self.folder / SUMMARY_FILE, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")


def _is_own(path: Path) -> bool:
    """Whether it is neither a draft nor the folder of the base, which is measured first."""
    return path.name != BASE_FOLDER and not is_draft(path.name)


def _line(record: Record) -> str:
    return json.dumps(record.as_json(), ensure_ascii=False) + "\n"


def require_unfinished(folder: Path, marker: str) -> None:
    """Raises `OutputError` if `folder` holds finished results, of which `marker` is the last file."""
    if (folder / marker).exists():
        raise OutputError(f"save_dir: {folder} holds finished results -> name a new folder in save_dir")


def require_same(folder: Path, identity: Any, *, reuses: bool = False) -> None:
    """Raises `OutputError` unless `folder` holds unfinished results with this identity, or finished if `reuses`."""
    remedy = "name a new folder in save_dir"
    if (folder / SUMMARY_FILE).exists() and not reuses:
        raise OutputError(f"save_dir: {folder} holds finished results -> {remedy}")
    try:
        written = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise OutputError(f"save_dir: {folder} exists and holds no results of this command -> {remedy}") from None
    if written != identity:
        differing = sorted(_differing(written, identity)) or ["its content"]
        raise OutputError(
            f"save_dir: {folder} holds results of another command (it differs in {', '.join(differing)}) -> {remedy}"
        )


def _differing(written: Any, identity: Mapping[str, Any]) -> set[str]:
    """The names in the parts of an identity whose values differ."""
    found: set[str] = set()
    for part, new in identity.items():
        old = written.get(part, {}) if isinstance(written, dict) else {}
        if isinstance(new, dict) and isinstance(old, dict):
            found |= {name for name in {*new, *old} if new.get(name) != old.get(name)}
        elif old != new:
            found.add(part)
    return found


def read_records(folder: Path) -> list[Record]:
    """The records in results.jsonl. The last line is left out if it is not whole."""
    path = folder / LINES_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    try:
        return [Record.of(json.loads(line)) for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise OutputError(f"{path}: this is not a results file ({fault}) -> name a new folder in save_dir") from fault
