"""The list of all runs below the root, and the card for a first run."""

from datetime import datetime
from urllib.parse import urlencode

from nicegui import run, ui

from luthier.webui.board import Board
from luthier.webui.pages.frame import Frame
from luthier.webui.pages.parts import box, button, choice, enable, link, switch, text
from luthier.webui.runs import Run, find_runs

SECONDS = 2.0
"""Between two looks."""
MAX_COMPARED = 8
QUICKSTART = "examples/quickstart.yaml"
ADDRESS_OF_QUICKSTART = f"/new?file={QUICKSTART}"


class RunList:
    def __init__(self, frame: Frame, found: list[Run]) -> None:
        self.frame, self.board, self.found = frame, frame.board, found
        self.chosen: set[str] = set()
        """The addresses of the runs that are marked for comparison."""
        self.state = "all"

    def content(self) -> None:
        say = self.frame.say
        with box(classes="title"):
            text(say("page.runs"), "h1")
            with box(classes="row"):
                self.compare = button(say("runs.compare"), self._compare)
                link(say("page.new"), "/new", "button primary")
        if not self.found:
            first_run(self.frame)
        with box(classes="row faint"):
            text(str(self.board.root), classes="path")
            states = {"all": say("runs.all")} | {name: say(f"state.{name}") for name in ("running", "done", "failed")}
            choice("state", self.state, states, self._filter).element.props["aria-label"] = say("runs.state")
        self.rows()
        self._show_count()
        ui.timer(SECONDS, self._look)

    @ui.refreshable_method
    def rows(self) -> None:
        say = self.frame.say
        shown = [run for run in self.found if self.state in ("all", run.state)]
        if not shown:
            text(say("runs.none"), "p", "empty")
            return
        with box(classes="wide"), box("table", "runs"):
            text(say("page.runs"), "caption", "unseen")
            with box("thead"), box("tr"):
                for name in ("", "run", "state", "progress", "loss", "started"):
                    text(say(f"runs.{name}") if name else "", "th" if name else "td")
            with box("tbody"):
                for found in shown:
                    self._row(found)

    def _row(self, found: Run) -> None:
        say, name = self.frame.say, self.board.name_of(found.folder)
        with box("tr"):
            with box("td"):
                mark = switch(f"mark-{name}", name in self.chosen, lambda value: self._mark(name, value == "true"))
                mark.element.props["aria-label"] = f"{say('runs.mark')} {found.name}"
            with box("td"):
                link(found.name, f"/run/{name}", "name")
                text(name, "div", "faint path")
            with box("td"):
                badge(self.frame, found)
            with box("td"):
                progress(found)
            loss = found.last.get("loss")
            text(f"{loss:.4g}" if isinstance(loss, int | float) else "", "td", "number")
            with box("td"):
                when(found.started)

    async def _look(self) -> None:
        found = await run.io_bound(find_runs, self.board.root)
        if found is not None and found != self.found:
            self.found = found
            self.rows.refresh()

    def _filter(self, state: str) -> None:
        self.state = state
        self.rows.refresh()

    def _mark(self, name: str, is_on: bool) -> None:
        self.chosen = self.chosen | {name} if is_on else self.chosen - {name}
        self._show_count()

    def _show_count(self) -> None:
        enable(self.compare, 0 < len(self.chosen) <= MAX_COMPARED)

    def _compare(self) -> None:
        ui.navigate.to("/compare?" + urlencode([("run", name) for name in sorted(self.chosen)]))


def badge(frame: Frame, found: Run) -> None:
    """The state in a word, with a color that only repeats it."""
    where = f" · {found.host}" if found.host else ""
    text(frame.say(f"state.{found.state}") + where, classes=f"badge {found.state}").props["data-state"] = found.state


def progress(found: Run) -> None:
    step, total = found.last.get("current_steps"), found.last.get("total_steps")
    if isinstance(step, int) and isinstance(total, int) and total > 0:
        text(f"{step} / {total}", "div", "number")
        with box(classes="bar"):
            box().style(f"width: {min(100, 100 * step / total):.1f}%")


def when(seconds: float) -> None:
    """A time, in the time zone of the machine that the board runs on."""
    if seconds:
        text(f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}", "time", "faint")


def first_run(frame: Frame) -> None:
    """For those who have no run yet: a run that is filled in, and what each choice means."""
    say = frame.say
    with box("section", "card first"):
        text(say("first.title"), "h2")
        text(say("first.what"), "p")
        with box("dl"):
            for name in ("model", "data", "template", "method"):
                text(say(f"first.{name}"), "dt")
                text(say(f"first.{name}_means"), "dd")
        has_example = (frame.board.root / QUICKSTART).is_file()
        link(say("first.open"), ADDRESS_OF_QUICKSTART if has_example else "/new", "button primary")
        if not has_example:
            text(say("first.no_example"), "p", "faint")


async def build(board: Board, frame: Frame) -> None:
    found = await run.io_bound(find_runs, board.root)
    frame.show(RunList(frame, found or []).content)
