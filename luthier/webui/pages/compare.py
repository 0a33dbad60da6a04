"""Up to eight runs side by side: their curves on one axis, and the keys that differ."""

from pathlib import Path
from urllib.parse import quote

from nicegui import run, ui

from luthier.webui.board import Board
from luthier.webui.document import differing
from luthier.webui.pages.charts import Chart, view_settings
from luthier.webui.pages.frame import Frame
from luthier.webui.pages.parts import box, choice, label_for, link, table, text
from luthier.webui.pages.runs import MAX_COMPARED, badge
from luthier.webui.runs import read_run
from luthier.webui.watch import Curves, Point

SECONDS = 2.0


class Compare:
    def __init__(self, frame: Frame, folders: dict[str, Path]) -> None:
        self.frame, self.folders = frame, folders
        self.curves: dict[str, Curves] = {name: frame.board.curves(folder) for name, folder in folders.items()}
        self.metric, self.is_log, self.smoothing = "loss", False, 0.0
        self._drawn: object = None

    def content(self) -> None:
        say = self.frame.say
        text(say("page.compare"), "h1")
        if not self.folders:
            text(say("compare.none"), "p", "empty")
            link(say("page.runs"), "/", "button")
            return
        with box("ul", "row plain"):
            for name, folder in self.folders.items():
                with box("li", "row"):
                    link(name, f"/run/{quote(name)}")
                    badge(self.frame, read_run(folder))
        self.settings()
        self.chart = Chart(self.metric)
        self.chart.element.classes("large")
        self._drawn = None
        self._draw()
        text(say("compare.keys"), "h2")
        self._keys()
        text(say("compare.last"), "h2")
        self._last()
        ui.timer(SECONDS, self._look)

    @ui.refreshable_method
    def settings(self) -> None:
        say = self.frame.say
        metrics = dict.fromkeys(name for curves in self.curves.values() for name in curves.names)
        with box(classes="row"):
            label_for("metric", say("curves.metric"))
            choice("metric", self.metric, {name: name for name in metrics}, self._set_metric)
            view_settings(
                self.frame,
                is_log=self.is_log,
                smoothing=self.smoothing,
                on_log=self._set_log,
                on_smoothing=self._set_smoothing,
            )

    def _set_metric(self, name: str) -> None:
        self.metric = name
        self._draw()

    def _set_log(self, is_log: bool) -> None:
        self.is_log = is_log
        self._draw()

    def _set_smoothing(self, weight: float) -> None:
        self.smoothing = weight
        self._draw()

    def series(self) -> dict[str, list[Point]]:
        return {name: curves.curve(self.metric) for name, curves in self.curves.items()}

    async def _look(self) -> None:
        names = [curves.names for curves in self.curves.values()]
        for curves in self.curves.values():
            await run.io_bound(curves.read)
        if names != [curves.names for curves in self.curves.values()]:
            self.settings.refresh()
        self._draw()

    def _draw(self) -> None:
        are_samples = [curves.is_sample for curves in self.curves.values()]
        settings = (self.metric, self.is_log, self.smoothing, are_samples)
        draw = self.chart.follow if settings == self._drawn else self.chart.draw
        self._drawn = settings
        self.chart.name = self.metric
        draw(self.series(), is_log=self.is_log, smoothing=self.smoothing)

    def _keys(self) -> None:
        texts = {name: read_run(folder).text for name, folder in self.folders.items()}
        rows = [[key, *(row[name] or "–" for name in texts)] for key, row in differing(texts).items()]
        if rows:
            table(["", *texts], rows, self.frame.say("compare.keys"))
        else:
            text(self.frame.say("compare.same"), "p", "empty")

    def _last(self) -> None:
        """The last value of every curve."""
        metrics = dict.fromkeys(name for curves in self.curves.values() for name in curves.names)
        rows = []
        for metric in metrics:
            ends = [curves.last_value(metric) for curves in self.curves.values()]
            rows.append([metric, *("–" if end is None else f"{end:.5g}" for end in ends)])
        table(["", *self.folders], rows, self.frame.say("compare.last"))


async def build(board: Board, frame: Frame, names: list[str]) -> None:
    folders = {name: folder for name in names if (folder := board.folder_of(name)) is not None and folder.is_dir()}
    folders = dict(list(folders.items())[:MAX_COMPARED])
    for folder in folders.values():
        await run.io_bound(board.curves(folder).glance)
    frame.show(Compare(frame, folders).content)
