"""One run: its state, numbers, curves, log and files, and what can be done with it."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import run, ui
from nicegui.elements.mixins.text_element import TextElement

from luthier.core.errors import LuthierError
from luthier.core.manifest import CONSOLE
from luthier.webui import process
from luthier.webui.board import Board
from luthier.webui.evaluations import RESULTS
from luthier.webui.pages.charts import Chart, view_settings
from luthier.webui.pages.evaluation import EvaluationPart
from luthier.webui.pages.frame import Frame
from luthier.webui.pages.parts import (
    box,
    button,
    confirmed,
    enable,
    link,
    show,
    table,
    tell,
    text,
)
from luthier.webui.pages.runs import badge, when
from luthier.webui.runs import Run, files_in, read_object, read_run
from luthier.webui.watch import Curves, console_end

SECONDS = 1.0
"""Between two looks."""
NUMBERS = ("step", "loss", "speed", "left", "elapsed")
MAX_FILES = 200
NOTHING: tuple[int, tuple[str, ...], bool] = (-1, (), False)
"""No version of the curves is drawn."""


class RunPage:
    def __init__(self, frame: Frame, folder: Path) -> None:
        self.frame, self.folder = frame, folder
        self.curves = frame.board.curves(folder)
        self.found, self.console = read_run(folder), console_end(folder / CONSOLE)
        self.smoothing, self.is_log = 0.0, False
        self._drawn = NOTHING

    def content(self) -> None:
        say = self.frame.say
        with box(classes="title"):
            with box(classes="row"):
                text(self.found.name, "h1")
                self.state()
            with box(classes="row"):
                name = quote(self.frame.board.name_of(self.folder))
                self.results_of = [
                    link(say("run.talk"), f"/chat?model={name}", "button primary"),
                    link(say("page.export"), f"/export?model={name}", "button"),
                    link(say("page.evaluate"), f"/evaluate?model={name}", "button"),
                ]
                self.buttons = {
                    "stop": button(say("run.stop"), self._stop),
                    "now": button(say("run.now"), self._stop),
                    "kill": button(say("run.kill"), self._kill, "danger"),
                    "resume": button(say("run.resume"), self._resume),
                    "delete": button(say("run.delete"), self._delete, "danger"),
                }
        text(self.frame.board.name_of(self.folder), "p", "faint path")
        self.note = text("", "p", "note")
        self.note.props["role"] = "status"
        with box("dl", "numbers"):
            self.numbers = {name: _number(say(f"run.{name}")) for name in NUMBERS}
        with box(classes="row") as settings:
            view_settings(
                self.frame,
                is_log=self.is_log,
                smoothing=self.smoothing,
                on_log=self._set_log,
                on_smoothing=self._set_smoothing,
            )
        self.charts: dict[str, Chart] = {}
        self.places = box(classes="charts")
        self.about_curves = (settings, self.places)
        self.results()
        text(say("run.log"), "h2")
        self.log = text(self.console, "pre", "log console")
        self.log.props.update({"tabindex": 0, "aria-label": say("run.log")})
        self._details()
        self._draw_again()
        ui.timer(SECONDS, self._look)

    def _set_log(self, is_log: bool) -> None:
        self.is_log = is_log
        self._draw_again()

    def _set_smoothing(self, weight: float) -> None:
        self.smoothing = weight
        self._draw_again()

    def _draw_again(self) -> None:
        self._drawn = NOTHING
        self._draw()

    @ui.refreshable_method
    def results(self) -> None:
        """What training and evaluation wrote at their end."""
        found = read_object(self.folder / "all_results.json")
        if found and not self.found.is_live:
            text(self.frame.say("run.results"), "h2")
            rows = [[name, f"{value:.6g}" if isinstance(value, float) else str(value)] for name, value in found.items()]
            table((), rows, self.frame.say("run.results"))
        EvaluationPart(self.frame, self.folder).content()

    @ui.refreshable_method
    def state(self) -> None:
        badge(self.frame, self.found)

    async def _look(self) -> None:
        found = await run.io_bound(read_run, self.folder)
        console = await run.io_bound(console_end, self.folder / CONSOLE)
        await run.io_bound(self.curves.read)
        if found is None or console is None:  # the board ends
            return
        was, self.found, self.console = self.found, found, console
        if was.state != found.state:
            self.state.refresh()
            self.results.refresh()
            self.files.refresh()
            self._drawn = NOTHING
        self._draw()

    def _draw(self) -> None:
        found, say = self.found, self.frame.say
        for name, value in zip(NUMBERS, _values(found, self.curves), strict=True):
            show(self.numbers[name], value)
        note = "silent" if found.silent_since else found.state
        show(self.note, say(f"note.{note}").format(status=found.status, time=when(found.silent_since)))
        is_reachable = found.is_live and found.is_ours
        enable(self.buttons["stop"], is_reachable and found.state == "running")
        enable(self.buttons["now"], is_reachable and found.state == "stopping")
        enable(self.buttons["kill"], is_reachable)
        enable(self.buttons["resume"], not found.is_live and found.state != "done" and found.run_file is not None)
        enable(self.buttons["delete"], not found.is_live)
        for way in self.results_of:
            way.set_visibility(found.state == "done" and not (self.folder / RESULTS).is_dir())
        if self.log.text != self.console:
            self.log.set_text(self.console)
            ui.run_javascript(f"const log = getElement({self.log.id}); if (log) log.scrollTop = log.scrollHeight")
        self._draw_curves()

    def _draw_curves(self) -> None:
        names = self.curves.names
        for part in self.about_curves:  # while a run is live its curves have their place, so nothing jumps
            part.set_visibility(bool(names) or self.found.is_live)
        was, self._drawn = self._drawn, (self.curves.version, names, self.curves.is_sample)
        if self._drawn == was:
            return
        is_another = was == NOTHING or was[2] != self.curves.is_sample
        for name in names:
            if name not in self.charts:
                with self.places:
                    self.charts[name] = Chart(name)
            draw = self.charts[name].draw if is_another else self.charts[name].follow
            draw({name: self.curves.curve(name)}, is_log=self.is_log, smoothing=self.smoothing)

    def _details(self) -> None:
        with box("details"):
            text(self.frame.say("run.files"), "summary")
            self.files()
        if self.found.run_file is not None:
            with box("details"):
                text(self.frame.say("run.run_file"), "summary")
                text(self.found.text, "pre", "log")
                link(self.frame.say("run.again"), f"/new?file={quote(self.frame.board.name_of(self.found.run_file))}")

    @ui.refreshable_method
    def files(self) -> None:
        with box("ul", "files"):
            for name, num_bytes in files_in(self.folder)[:MAX_FILES]:
                text(f"{name}  ·  {num_bytes:,} B", "li")

    async def _stop(self) -> None:
        """Asked again, the run ends at once."""
        await self._do(lambda: process.stop(self.found))

    async def _kill(self) -> None:
        say = self.frame.say
        if await confirmed(say("run.kill_question"), say("run.kill"), say("run.cancel")):
            await self._do(lambda: process.kill(self.found))

    async def _resume(self) -> None:
        await self._do(lambda: process.resume(self.found))

    async def _delete(self) -> None:
        say, root = self.frame.say, self.frame.board.root
        if not await confirmed(
            say("run.delete_question").format(name=self.found.name), say("run.delete"), say("run.cancel")
        ):
            return
        if await self._do(lambda: process.delete(self.found, root)):
            ui.navigate.to("/")

    async def _do(self, action: Callable[[], Any]) -> bool:
        """Do something with the run, and show what came of it. Returns whether it could be done."""
        try:
            await run.io_bound(action)
        except LuthierError as fault:
            tell(str(fault))
            return False
        if self.folder.is_dir():
            await self._look()
        return True


def _number(name: str) -> TextElement:
    with box():
        text(name, "dt")
        return text("", "dd", "number")


def _values(found: Run, curves: Curves) -> tuple[str, ...]:
    """Step, loss, speed, time left and elapsed time, as far as they are known."""
    last = curves.last or found.last
    step, total = last.get("current_steps"), last.get("total_steps")
    loss = last.get("loss") if (value := curves.last_value("loss")) is None else value
    speed = curves.steps_per_second
    left = last.get("remaining_time", "") if found.is_live else ""
    if found.is_live and speed and isinstance(step, int) and isinstance(total, int):
        left = str(timedelta(seconds=round((total - step) / speed)))
    throughput = last.get("throughput")
    pace = f"{speed:.3g} /s" if speed else ""
    pace += f" · {throughput:,.0f} tokens/s" if isinstance(throughput, int | float) else ""
    return (
        f"{step} / {total}" if step is not None else "–",
        f"{loss:.4g}" if isinstance(loss, int | float) else "–",
        pace.removeprefix(" · ") or "–",
        str(left) or "–",
        str(last.get("elapsed_time", "–")),
    )


async def build(board: Board, frame: Frame, name: str) -> None:
    folder = board.folder_of(name)
    if folder is None or not folder.is_dir():
        frame.show(lambda: text(frame.say("run.absent").format(name=name), "p", "empty"))
        return
    await run.io_bound(board.curves(folder).glance)
    frame.show(RunPage(frame, folder).content, folder.name)
