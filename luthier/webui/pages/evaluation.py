"""The part of a run's page about `luthier eval`: what an evaluation found, or the evaluations of a training run."""

from pathlib import Path
from urllib.parse import quote

from luthier.webui.evaluations import evaluations_of, records_in, tables_in
from luthier.webui.pages.frame import Frame
from luthier.webui.pages.parts import box, link, table, text


class EvaluationPart:
    def __init__(self, frame: Frame, folder: Path) -> None:
        self.frame, self.folder = frame, folder

    def content(self) -> None:
        say = self.frame.say
        for name, found in tables_in(self.folder).items():
            text(f"{say('run.evaluation')} {name}".rstrip(), "h2")
            self._table(found)
        records = records_in(self.folder)
        if records:
            with box("details"):
                text(say("run.records"), "summary")
                heads = [say(f"run.record_{name}") for name in ("subject", "number", "content")]
                table(heads, records, say("run.records"))
        board = self.frame.board
        for run in evaluations_of(self.folder.resolve(), board.runs()):
            text(say("run.evaluation"), "h2")
            link(board.name_of(run.folder), f"/run/{quote(board.name_of(run.folder))}")
            for found in tables_in(run.folder).values():
                self._table(found)

    def _table(self, found: str) -> None:
        shown = text(found, "pre", "log")
        shown.props.update({"tabindex": 0, "aria-label": self.frame.say("run.evaluation")})
