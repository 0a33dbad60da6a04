"""A person at the terminal who gets things wrong: runs the real program and looks at what it says and leaves behind."""

import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.cli import main


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    def complaint(self, status: int = 2) -> str:
        """The one message of a run that ended with `status`; it stands last and nothing looks like a crash."""
        assert self.status == status, self.err
        assert "Traceback" not in self.err
        assert len(re.findall("^luthier: ", self.err, re.MULTILINE)) == 1, self.err
        return self.err[self.err.index("luthier: ") :].strip()


def contents(*folders: Path) -> dict[str, str]:
    """Path -> sha256 of every file below the folders."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Person:
    """Runs commands. `keys` are those of a small run that works; `folder` is empty at first, its `out` the output."""

    def __init__(self, keys: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.out, self._capsys = folder, folder / "out", capsys
        self.keys = {**keys, "output_dir": str(self.out)}
        self.world = Path(keys["dataset_dir"]).parent

    def types(self, *words: str) -> Outcome:
        """`luthier WORDS`"""
        self._capsys.readouterr()
        try:
            status = main(list(words))
        except SystemExit as end:  # argparse
            status = int(end.code or 0)
        said = self._capsys.readouterr()
        return Outcome(status, said.out, said.err)

    def run_file(self, text: str | bytes | None = None, *, drop: Collection[str] = (), **changes: Any) -> str:
        """Writes run.yaml: `text`, or the keys that work with `changes` and without `drop`."""
        path = self.folder / "run.yaml"
        if text is None:
            keys = {name: value for name, value in {**self.keys, **changes}.items() if name not in drop}
            text = yaml.safe_dump(keys, allow_unicode=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    def trains(self, *, drop: Collection[str] = (), **changes: Any) -> Outcome:
        return self.types("train", self.run_file(drop=drop, **changes))

    def is_refused(self, *, drop: Collection[str] = (), command: str = "train", **changes: Any) -> str:
        """The complaint about a run that must not begin: it ends with status 2, says nothing else, touches no file."""
        return self.is_refused_words(command, self.run_file(drop=drop, **changes))

    def is_refused_words(self, *words: str) -> str:
        before = contents(self.folder, self.world)
        outcome = self.types(*words)
        complaint = outcome.complaint(2)
        assert contents(self.folder, self.world) == before
        assert outcome.out == ""
        return complaint

    def dataset(self, content: str | bytes | None, description: Any = None, name: str = "rows.json") -> dict[str, Any]:
        """The keys that use a data file of one's own; `description` is its entry in dataset_info.json."""
        folder = self.folder / "my data"
        folder.mkdir(exist_ok=True)
        if content is not None:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        entry = {"file_name": name} | (description or {})
        (folder / "dataset_info.json").write_text(json.dumps({"rows": entry}, indent=1), encoding="utf-8")
        return {"dataset_dir": str(folder), "dataset": "rows"}
