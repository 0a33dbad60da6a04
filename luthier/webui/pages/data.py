"""The datasets of a dataset_info.json with their faults, their rows raw and as tokens with labels, and the doctor."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from nicegui import run, ui

from luthier.core.errors import LuthierError, Problem
from luthier.data.sources.catalog import Catalog, load_catalog
from luthier.webui.board import Board
from luthier.webui.commands import doctor_of, rows_of
from luthier.webui.document import as_yaml
from luthier.webui.pages.frame import Frame
from luthier.webui.pages.parts import Handler, box, button, enable, label_for, show, text, text_input
from luthier.webui.raw_rows import RawRow, raw_rows

NUM_ROWS = 20
KEYS = ("dataset_dir", "dataset", "model_name_or_path", "template", "stage")
FIRST = {"dataset_dir": "data", "template": "auto", "stage": "sft"}
QUICKSTART = {"dataset_dir": "examples/data", "model_name_or_path": "models/SmolLM2-135M-Instruct.gguf"}


class DataPage:
    def __init__(self, frame: Frame, given: dict[str, str]) -> None:
        self.frame, self.given = frame, given
        self.found: Catalog | str = ""
        """The catalog, or why there is none."""
        self.raw: list[RawRow] = []
        self.page, self.report, self.fault = "", "", ""
        """The rows as tokens, what the doctor says, or why there is neither."""

    def content(self) -> None:
        say = self.frame.say
        text(say("page.data"), "h1")
        label_for("dataset_dir", "dataset_dir")
        text_input("dataset_dir", self.given["dataset_dir"], self._set_folder)
        self.entries()
        text(say("data.rows"), "h2")
        self.inputs = {}
        with box(classes="grid"):
            for key in KEYS[1:]:
                with box():
                    label_for(key, key)
                    self.inputs[key] = text_input(key, self.given[key], self._setter(key))
        with box(classes="row"):
            self.buttons = [button(say("data.show"), self._show_rows), button(say("data.doctor"), self._examine)]
            self.state = text("", classes="faint")
            self.state.props["role"] = "status"
        self.result()

    @ui.refreshable_method
    def entries(self) -> None:
        """One line for each dataset, with every problem of its description."""
        if isinstance(self.found, str):
            text(self.found, "p", "fault")
            return
        with box("ul", "entries"):
            for name in self.found.names:
                with box("li"):
                    button(name, lambda name=name: self._choose(name), "quiet")
                    _problems(self.found.errors.get(name, ()), "fault")
                    _problems(self.found.warnings.get(name, ()), "warning")

    @ui.refreshable_method
    def result(self) -> None:
        say = self.frame.say
        if self.report:
            text(self.report, "pre", "log whole")
        with box(classes="sides even"):
            if self.raw:
                with box("section"):
                    text(say("data.raw"), "h2")
                    with box("ol", "raw") as rows:
                        rows.props.update({"tabindex": 0, "aria-label": say("data.raw")})
                        for row in self.raw:
                            with box("li"):
                                text(row.place, "div", "faint path")
                                text(row.text, "pre", "" if row.is_usable else "fault")
            if self.page or self.fault:
                with box("section"):
                    text(say("data.tokens"), "h2")
                    self._tokens()

    def _tokens(self) -> None:
        if self.fault:
            text(self.fault, "pre", "log fault")
            return
        page = box("iframe", "rows")
        # The page brings its own style and script; it can reach neither this page nor another host.
        page.props.update({"srcdoc": self.page, "sandbox": "allow-scripts", "title": self.frame.say("data.tokens")})

    def _setter(self, key: str) -> Handler:
        def set_it(value: str) -> None:
            self.given[key] = value

        return set_it

    async def _set_folder(self, value: str) -> None:
        self.given["dataset_dir"] = value
        await self.read()
        self.entries.refresh()

    async def read(self) -> None:
        self.found = await run.io_bound(_read, self.given["dataset_dir"]) or ""

    def _choose(self, name: str) -> None:
        self.given["dataset"] = name
        self.inputs["dataset"].set(name)

    def run_file(self, **others: str) -> str:
        given = {key: value for key, value in self.given.items() if value.strip()}
        return "".join(f"{key}: {as_yaml(value, is_text=True)}\n" for key, value in given.items()) + "".join(
            f"{key}: {value}\n" for key, value in others.items()
        )

    async def _show_rows(self) -> None:
        """The rows of the files at once, and beside them what training makes of them."""
        with self._working():
            names = [name.strip() for name in self.given["dataset"].split(",") if name.strip()]
            self.raw = await run.io_bound(raw_rows, self.given["dataset_dir"], names, NUM_ROWS) or []
            self.result.refresh()
            self.page = await rows_of(self.run_file(max_samples=str(NUM_ROWS)), NUM_ROWS)

    async def _examine(self) -> None:
        with self._working():
            self.report = await doctor_of(self.run_file())

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Shows that something is being done, and then what came of it."""
        self.raw, self.page, self.report, self.fault = [], "", "", ""
        show(self.state, self.frame.say("data.working"))
        for made in self.buttons:
            enable(made, False)
        try:
            yield
        except LuthierError as fault:
            self.fault = str(fault)
        show(self.state, "")
        for made in self.buttons:
            enable(made, True)
        self.result.refresh()


def _read(folder: str) -> Catalog | str:
    try:
        return load_catalog(folder)
    except LuthierError as fault:
        return str(fault)


def _problems(problems: Iterable[Problem], kind: str) -> None:
    for problem in problems:
        text(str(problem), "p", kind)


async def build(board: Board, frame: Frame) -> None:
    has_example = (board.root / QUICKSTART["dataset_dir"]).is_dir() and not (board.root / "data").is_dir()
    page = DataPage(frame, dict.fromkeys(KEYS, "") | FIRST | (QUICKSTART if has_example else {}))
    await page.read()
    frame.show(page.content)
