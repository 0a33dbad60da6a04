"""The list of all runs below the root, and the card for a first run."""

from datetime import datetime
from typing import Any
from urllib.parse import quote, urlencode

from nicegui import run, ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

from luthier.webui.board import Board
from luthier.webui.pages.frame import Frame
from luthier.webui.pages.parts import Handler, box, button, choice, enable, link, text
from luthier.webui.runs import Run

SECONDS = 2.0
"""Between two looks."""
MAX_COMPARED = 8
QUICKSTART = "examples/quickstart.yaml"
ADDRESS_OF_QUICKSTART = f"/new?file={QUICKSTART}"


COLUMNS = ("run", "state", "progress", "loss", "started")


class RunTable(Element, component="run_table.js"):
    """All rows as one element: 500 runs as elements of NiceGUI would take two seconds."""

    def __init__(self, rows: list[dict[str, Any]], head: list[str], caption: str, on_mark: Handler) -> None:
        """`on_mark` gets the path of a run and whether it is marked."""
        super().__init__()
        self.props.update({"head": head, "caption": caption})
        self.show(rows)
        self.on("mark", lambda event: on_mark(*event.args))

    def show(self, rows: list[dict[str, Any]]) -> None:
        self.props["rows"] = tuple(rows)  # NiceGUI watches lists and what is in them for changes


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
        rows = self._rows()
        if not rows:
            text(say("runs.none"), "p", "empty")
            return
        with box(classes="wide"):
            self.table = RunTable(rows, [say(f"runs.{name}") for name in COLUMNS], say("page.runs"), self._mark)

    def _rows(self) -> list[dict[str, Any]]:
        return [self._row(run) for run in self.found if self.state in ("all", run.state)]

    def _row(self, found: Run) -> dict[str, Any]:
        """What a row shows, for its template."""
        name, loss = self.board.name_of(found.folder), found.last.get("loss")
        step, total = steps_of(found)
        return {
            "path": name,
            "address": f"/run/{quote(name)}",
            "name": found.name,
            "mark": f"{self.frame.say('runs.mark')} {found.name}",
            "is_marked": name in self.chosen,
            "state": found.state,
            "word": state_in_a_word(self.frame, found),
            "steps": f"{step} / {total}" if total else "",
            "percent": round(min(100, 100 * step / total), 1) if total else 0,
            "loss": f"{loss:.4g}" if isinstance(loss, int | float) else "",
            "started": when(found.started),
        }

    async def _look(self) -> None:
        found = await run.io_bound(self.board.runs)
        if found is None or found == self.found:
            return
        had_rows, self.found = bool(self._rows()), found
        rows = self._rows()
        if had_rows and rows:
            self.table.show(rows)
        else:
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


def badge(frame: Frame, found: Run) -> TextElement:
    """The state in a word, with a color that only repeats it."""
    made = text(state_in_a_word(frame, found), classes=f"badge {found.state}")
    made.props["data-state"] = found.state
    return made


def state_in_a_word(frame: Frame, found: Run) -> str:
    """With the machine, if it is another one."""
    return frame.say(f"state.{found.state}") + (f" · {found.host}" if found.host else "")


def steps_of(found: Run) -> tuple[int, int]:
    """The step that was logged last, and the number of all; zeros if there is none yet."""
    step, total = found.last.get("current_steps"), found.last.get("total_steps")
    return (step, total) if isinstance(step, int) and isinstance(total, int) else (0, 0)


def when(seconds: float) -> str:
    """A time, in the time zone of the machine that the board runs on; empty if it is not known."""
    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}" if seconds else ""


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
    found = await run.io_bound(board.runs)
    frame.show(RunList(frame, found or []).content)
