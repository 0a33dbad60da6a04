"""Multiple-choice questions in the layout of LLaMA-Factory's benchmarks.

    task_dir/mmlu/mapping.json                        {"anatomy": {"name": "anatomy", "category": "STEM"}, ...}
    task_dir/mmlu/data/test/anatomy_test.csv          question,A,B,C,D,answer without a header
    task_dir/mmlu/data/dev/anatomy_dev.csv            solved examples

A file may have up to ten choices (A to J); all its lines have the same number of columns.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core.errors import DataError
from luthier.core.registry import did_you_mean

LETTERS = "ABCDEFGHIJ"
MIN_CHOICES = 2
NAME = re.compile(r"(?P<folder>[^/\s]+)_(?P<split>train|dev|validation|val|test)")
"""A value of `task`."""
FOLDER_OF = {"train": "dev", "dev": "dev", "validation": "val", "val": "val", "test": "test"}
"""Split -> the folder and the file ending of its questions."""
EXAMPLES = "dev"


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    choices: tuple[str, ...]
    answer: str
    """The letter of the right choice."""

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.choices)]


@dataclass(frozen=True, slots=True)
class Subject:
    key: str
    """In mapping.json and in the names of files."""
    name: str
    category: str
    questions: tuple[Question, ...]
    examples: tuple[Question, ...]
    """Those to draw solved examples from; empty if none are wanted."""


@dataclass(frozen=True, slots=True)
class Benchmark:
    subjects: tuple[Subject, ...]
    """In the order of mapping.json."""
    hashes: Mapping[str, str]
    """sha256 of all that was read."""


def read_benchmark(task_dir: Path, task: str, *, with_examples: bool) -> Benchmark:
    """Raises `DataError` with one sentence for the first fault."""
    match = NAME.fullmatch(task)
    assert match is not None, "only such a task is of this kind"
    folder, split = task_dir / match["folder"], FOLDER_OF[match["split"]]
    if not folder.is_dir():
        names = [path.name for path in task_dir.iterdir() if path.is_dir()] if task_dir.is_dir() else []
        hint = did_you_mean(match["folder"], names) or f"set task_dir to the folder that holds {match['folder']}/"
        raise DataError(f"task: {task}: there is no folder {folder} -> {hint}")
    mapping_digest, questions_digest = hashlib.sha256(), hashlib.sha256()
    subjects = []
    for key, (name, category) in _read_mapping(folder / "mapping.json", mapping_digest).items():
        path = folder / "data" / split / f"{key}_{split}.csv"
        questions = _read_questions(path, questions_digest, "each subject of mapping.json needs this file")
        examples: tuple[Question, ...] = ()
        if with_examples:
            path = folder / "data" / EXAMPLES / f"{key}_{EXAMPLES}.csv"
            examples = _read_questions(path, questions_digest, "solved examples come from it; n_shot: 0 asks without")
        subjects.append(Subject(key, name, category, questions, examples))
    hashes = {"mapping.json": mapping_digest.hexdigest(), "questions": questions_digest.hexdigest()}
    return Benchmark(tuple(subjects), hashes)


def _read_mapping(path: Path, digest: "hashlib._Hash") -> dict[str, tuple[str, str]]:
    """Key of a subject -> its name and category."""
    text = _read(path, digest, 'it lists the subjects: {"anatomy": {"name": "anatomy", "category": "STEM"}}')
    try:
        mapping = json.loads(text)
    except (ValueError, RecursionError) as fault:
        raise DataError(f"{path}: this is not valid JSON ({fault})") from fault
    if not isinstance(mapping, dict) or not mapping:
        raise DataError(f"{path}: it must be a JSON object with at least one subject")
    return {key: _described(path, key, entry) for key, entry in mapping.items()}


def _described(path: Path, key: str, entry: Any) -> tuple[str, str]:
    name, category = (entry.get("name"), entry.get("category")) if isinstance(entry, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(category, str):
        raise DataError(f'{path}: the subject {key!r} must have texts "name" and "category"')
    return name, category


def _read_questions(path: Path, digest: "hashlib._Hash", remedy: str) -> tuple[Question, ...]:
    text = _read(path, digest, remedy)
    found: list[Question] = []
    lines = csv.reader(io.StringIO(text, newline=""))
    try:
        for row in lines:
            if row:
                found.append(_question(f"{path}: line {lines.line_num}", row, len(found[0].choices) if found else None))
    except csv.Error as fault:
        raise DataError(f"{path}: line {lines.line_num}: this is not valid CSV ({fault})") from fault
    if not found:
        raise DataError(f"{path}: there are no questions in this file -> leave the subject out of mapping.json")
    return tuple(found)


def _question(where: str, row: list[str], num_choices: int | None) -> Question:
    """`num_choices`: of the lines before, if there are any."""
    text, *choices, answer = row if len(row) > 1 else [*row, ""]
    least, most = MIN_CHOICES + 2, len(LETTERS) + 2
    if num_choices is None and not least <= len(row) <= most:
        raise DataError(
            f"{where}: there are {len(row)} columns -> write question, {MIN_CHOICES} to {len(LETTERS)} choices, answer"
        )
    if num_choices is not None and len(choices) != num_choices:
        raise DataError(
            f"{where}: there are {len(row)} columns, and {num_choices + 2} in the lines before"
            ' -> put "..." around texts with commas'
        )
    letter = answer.strip()
    if len(letter) != 1 or letter not in LETTERS[: len(choices)]:
        raise DataError(
            f"{where}: the answer is {answer!r} and must be a letter from A to {LETTERS[len(choices) - 1]}"
            " -> correct it; the file has no header line"
        )
    return Question(text, tuple(choices), letter)


def _read(path: Path, digest: "hashlib._Hash", remedy: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as fault:
        raise DataError(f"{path}: cannot be read ({fault.strerror}) -> {remedy}") from fault
    digest.update(content)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as fault:
        raise DataError(f"{path}: this is not UTF-8 text ({fault.reason}) -> save it as UTF-8") from fault
