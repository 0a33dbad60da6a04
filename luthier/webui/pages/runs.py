"""The list of all runs below the root, and the card for a first run."""

from datetime import datetime
from typing import NamedTuple
from urllib.parse import urlencode

from nicegui import run, ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

from luthier.webui.board import Board
from luthier.webui.pages.frame import Frame
from luthier.webui.pages.parts import box, button, choice, enable, link, show, switch, text
from luthier.webui.runs import Run, find_runs

SECONDS = 2.0
"""Between two looks."""
MAX_COMPARED = 8
QUICKSTART = "examples/quickstart.yaml"
ADDRESS_OF_QUICKSTART = f"/new?file={QUICKSTART}"


class Cells(NamedTuple):
    """What changes in the row of a run."""

    state: TextElement
    steps: TextElement
    bar: Element
    done: Element
    loss: TextElement


class RunList:
    def __init__(self, frame: Frame, found: list[Run]) -> None:
        self.frame, self.board, self.found = frame, frame.board, found
        self.chosen: set[str] = set()
        """The addresses of the runs that are marked for comparison."""
        self.state = "all"
        self.cells: dict[str, Cells] = {}

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
                state = badge(self.frame, found)
            with box("td"):
                steps = text("", "div", "number")
                with box(classes="bar") as bar:
                    done = box()
            self.cells[name] = Cells(state, steps, bar, done, text("", "td", "number"))
            self._update(found)
            with box("td"):
                when(found.started)

    async def _look(self) -> None:
        found = await run.io_bound(find_runs, self.board.root)
        if found is None or found == self.found:
            return
        were, self.found = self.found, found
        if self.state == "all" and [run.folder for run in were] == [run.folder for run in found]:
            for one in found:  # in place, so that nobody loses the link he is about to click
                self._update(one)
        else:
            self.rows.refresh()

    def _update(self, found: Run) -> None:
        cells, step, total = self.cells[self.board.name_of(found.folder)], *steps_of(found)
        show_state(self.frame, cells.state, found)
        show(cells.steps, f"{step} / {total}" if total else "")
        cells.bar.set_visibility(total > 0)
        cells.done.style(f"width: {min(100, 100 * step / total) if total else 0:.1f}%")
        loss = found.last.get("loss")
        show(cells.loss, f"{loss:.4g}" if isinstance(loss, int | float) else "")

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


def badge(frame: Frame, found: Run) -> TextElement:
    """The state in a word, with a color that only repeats it."""
    made = text("", classes="badge")
    show_state(frame, made, found)
    return made


def show_state(frame: Frame, made: TextElement, found: Run) -> None:
    where = f" · {found.host}" if found.host else ""
    show(made, frame.say(f"state.{found.state}") + where)
    if made.props.get("data-state") != found.state:
        made.classes(replace=f"badge {found.state}")
        made.props["data-state"] = found.state


def steps_of(found: Run) -> tuple[int, int]:
    """The step that was logged last, and the number of all; zeros if there is none yet."""
    step, total = found.last.get("current_steps"), found.last.get("total_steps")
    return (step, total) if isinstance(step, int) and isinstance(total, int) else (0, 0)


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
