"""A form for a run file of training, export or evaluation, with the file itself beside it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import run, ui
from nicegui.element import Element

from luthier.core.errors import LuthierError, Problem
from luthier.webui import evaluations, form, process, run_files
from luthier.webui.board import Board
from luthier.webui.chat_models import chat_models
from luthier.webui.document import as_yaml, values_of, with_value
from luthier.webui.form import Checked, Field
from luthier.webui.pages.frame import Frame
from luthier.webui.pages.parts import (
    Input,
    area,
    box,
    button,
    choice,
    label_for,
    switch,
    tell,
    text,
    text_input,
)
from luthier.webui.pages.plan import PlanPane
from luthier.webui.runs import read_run
from luthier.webui.texts import key_help, texts

EMPTY = "stage: sft\ndo_train: true\nfinetuning_type: lora\ntemplate: auto\n"


class NewRun:
    def __init__(self, frame: Frame, content: str, command: str) -> None:
        """`command`: `train`, `export` or `eval`, which decides the keys and what runs."""
        self.command = command
        self.frame, self.root, self.text = frame, frame.board.root, content
        self.checked = Checked()
        self.name = ""
        self.found_by = ""
        self.inputs: dict[str, Input] = {}
        self.places: dict[str, Element] = {}
        """Key -> where its problems stand."""
        self.usual: dict[str, Element] = {}
        self.plan = PlanPane(frame, lambda: "" if self.checked.problems else self.text)
        self._shown: list[tuple[str, tuple[str, ...]]] = []

    def content(self) -> None:
        say = self.frame.say
        with box(classes="title"):
            text(say(f"page.{self.frame.page}"), "h1")
            with box(classes="row"):
                button(say("new.start"), self._start, "primary")
        self._load_row()
        with box(classes="sides"):
            with box("section", "fields"):
                label_for("search", say("new.search"))
                text_input("search", self.found_by, self._search, hint="lora_dropout")
                self.fields()
            with box("section", "file"):
                label_for("yaml", say("new.file"))
                self.area = area("yaml", self.text, self._edited, rows=26)
                self.area.element.classes("code")
                with box(classes="row"):  # above what grows
                    label_for("save-name", say("new.save_as"))
                    text_input("save-name", self.name, self._rename, hint="my-run")
                    button(say("new.save"), self._save)
                self.problems()
                if self.command == "train":
                    self.plan.content()
        ui.timer(0.1, self._check, once=True)

    def _load_row(self) -> None:
        say = self.frame.say
        with box(classes="row"):
            label_for("load", say("new.load"))
            text_input(
                "load", "", self._load, hint="run.yaml", known=lambda: run_files.run_files(self.root)
            ).element.classes("grow")

    @ui.refreshable_method
    def fields(self) -> None:
        """The usual fields, which stay as they are while others come and go, and the rest."""
        self.inputs, self.places, self.usual = {}, {}, {}
        values = values_of(self.text)
        for field in form.usual_fields(self.command):
            if self._is_wanted(field):
                self.usual[field.name] = self._field(field, values)
        self.rest()

    @ui.refreshable_method
    def rest(self) -> None:
        """The other groups. They are drawn again when other keys are read, e.g. after `stage` has changed."""
        values = values_of(self.text)
        first, *others = groups = form.groups(self.command, values)
        self._shown = [(group.name, tuple(field.name for field in group.fields)) for group in groups]
        for name in self.inputs.keys() - self.usual.keys():
            del self.inputs[name], self.places[name]
        read = {field.name for field in first.fields}
        for name, place in self.usual.items():
            place.set_visibility(name in read)
        for group in others:
            wanted = [field for field in group.fields if self._is_wanted(field)]
            if wanted and self.found_by:
                for field in wanted:
                    self._field(field, values)
            elif wanted:
                self._closed_group(group.name, wanted, values)

    def _closed_group(self, name: str, fields: list[Field], values: dict[str, str]) -> None:
        """Its fields are drawn when it is opened for the first time: a form has more than 200."""
        with box("details") as group:
            given = sum(field.name in values for field in fields)
            with box("summary"):
                text(self._title_of(name))
                text(f"{given} / {len(fields)}" if given else str(len(fields)), classes="faint number")
            inside = box()

        def fill() -> None:
            if not inside.default_slot.children:
                with inside:
                    for field in fields:
                        self._field(field, values_of(self.text))

        group.on("toggle", fill, args=[])

    def _title_of(self, group: str) -> str:
        """Topics have a title; keys of one method or optimizer stand under its name, as a run file has it."""
        return texts(self.frame.language).get(f"group.{group}", group)

    def _is_wanted(self, field: Field) -> bool:
        words = self.found_by.lower().split()
        return all(word in field.name or word in self._help_of(field).lower() for word in words)

    def _help_of(self, field: Field) -> str:
        return key_help(self.frame.language).get(field.name, field.help)

    def _field(self, field: Field, values: dict[str, str]) -> Element:
        value = values.get(field.name, "")
        with box(classes=f"field {field.kind}") as place:
            label_for(field.name, field.name)
            made = self._input(field, value)
            made.element.props["aria-describedby"] = f"help-{field.name}"
            self.inputs[field.name] = made
            help_text = text(self._help_of(field), "div", "help")
            help_text.props["id"] = f"help-{field.name}"
            self.places[field.name] = box(classes="faults")
            self._show_faults(field.name)
        return place

    def _input(self, field: Field, value: str) -> Input:
        def changed(new: str) -> Any:
            return self._set(field, new)

        default = self.frame.say("new.required") if field.default == "" else field.default
        if field.kind == "switch":
            return switch(field.name, (value or field.default).lower() == "true", changed)
        if field.kind == "choice":
            options = {"": f"{self.frame.say('new.default')}: {field.default}"}
            options |= {name: name for name in field.choices}
            return choice(field.name, value, options | ({value: value} if value else {}), changed)
        known = (lambda: form.suggestions(field.name, values_of(self.text))) if form.is_name(field.name) else None
        return text_input(field.name, value, changed, hint=default, known=known)

    async def _set(self, field: Field, value: str) -> None:
        """A field was changed: the text follows."""
        is_default = field.kind == "switch" and value == field.default
        written = None if value.strip() == "" or is_default else as_yaml(value, is_text=field.is_text)
        self.text = with_value(self.text, field.name, written)
        self.area.set(self.text)
        await self._changed()

    async def _edited(self, content: str) -> None:
        """The text was changed: the fields follow."""
        self.text = content
        await self._changed()
        values = values_of(content)
        fields = {field.name: field for group in form.groups(self.command, values) for field in group.fields}
        for name, made in self.inputs.items():
            value = values.get(name, "")
            if name in fields and fields[name].kind == "switch":
                value = (value or fields[name].default).lower()
            made.set(value)

    async def _changed(self) -> None:
        groups = form.groups(self.command, values_of(self.text))
        if [(group.name, tuple(field.name for field in group.fields)) for group in groups] != self._shown:
            self.rest.refresh()
        await self._check()

    async def _check(self) -> None:
        content = self.text
        checked = await run.io_bound(form.check, content, self.command)
        if checked is None or content != self.text:  # it has been changed since, and is checked again
            return
        self.checked = checked
        self.problems.refresh()
        if self.command == "train":
            self.plan.changed()
        for name in self.places:
            self._show_faults(name)

    def _show_faults(self, name: str) -> None:
        place, found = self.places[name], self.checked.at(name)
        place.clear()
        with place:
            for problem in found:
                _fault(problem, self.checked)
        invalid = any(problem in self.checked.problems for problem in found)
        self.inputs[name].element.props["aria-invalid"] = str(invalid).lower()

    @ui.refreshable_method
    def problems(self) -> None:
        """Every problem, also of keys without a field."""
        with box(classes="summary") as whole:
            whole.props["role"] = "status"
            if not self.checked.problems:
                text(self.frame.say("new.fine"), "p", "fine")
            for problem in (*self.checked.problems, *self.checked.warnings):
                _fault(problem, self.checked, names_key=True)

    def _search(self, words: str) -> None:
        self.found_by = words
        self.fields.refresh()

    def _rename(self, name: str) -> None:
        self.name = name

    async def _load(self, name: str) -> None:
        path = self.root / os.path.expanduser(name.strip())
        if path.suffix and os.path.isfile(path):  # Path.is_file would raise for a name that is too long
            content = await self._do(lambda: run_files.load(path))
            if content is not None:
                self.area.set(content)
                await self._edited(content)

    async def _save(self) -> None:
        path = await self._do(lambda: run_files.save(self.root, self.name, self.text))
        if path is not None:
            tell(self.frame.say("new.saved").format(name=path.name), "positive")

    async def _start(self) -> None:
        content = self.text
        await self._check()
        if self.checked.problems:
            tell(self.frame.say("new.faults").format(count=len(self.checked.problems)))
            ui.run_javascript("document.querySelector('[aria-invalid=true]')?.focus()")
            return
        folder = self.root / os.path.expanduser(form.folder_in(content, self.command))
        if not self.frame.board.holds(folder):
            tell(self.frame.say("new.outside").format(folder=folder, root=self.root))
            return
        if await self._do(lambda: process.start(folder, content, self.command, self._words(folder))) is not None:
            ui.navigate.to(f"/run/{quote(self.frame.board.name_of(folder.resolve()))}")

    def _words(self, folder: Path) -> tuple[str, ...]:
        return evaluations.words_for(folder) if self.command == "eval" else ()

    async def _do(self, action: Callable[[], Any]) -> Any:
        """The result of an action, or None with its fault on the page."""
        try:
            return await run.io_bound(action)
        except LuthierError as fault:
            tell(str(fault))
            return None


def _fault(problem: Problem, checked: Checked, *, names_key: bool = False) -> None:
    line = f"{problem.line}: " if names_key and problem.line else ""
    subject = f"{line}{problem.key}: " if names_key else ""
    remedy = f" → {problem.remedy}" if problem.remedy else ""
    kind = "fault" if problem in checked.problems else "warning"
    text(f"{subject}{problem.reason}{remedy}", "p", kind)


async def build(board: Board, frame: Frame, file: str) -> None:
    content = EMPTY
    if file and (path := board.folder_of(file)) is not None:
        try:
            content = run_files.load(path)
        except LuthierError as fault:
            tell(str(fault))
    frame.show(NewRun(frame, content, "train").content)


async def build_export(board: Board, frame: Frame, name: str) -> None:
    """The form of an export. `name`: the run or checkpoint whose adapter is merged into its model."""
    model = (await run.io_bound(chat_models, board.root) or {}).get(name)
    merged = as_yaml(f"{name}-merged", is_text=True)
    content = f"{model.run_file}export_dir: {merged}\n" if model else "export_dir: merged\n"
    frame.show(NewRun(frame, content, "export").content)


async def build_evaluation(board: Board, frame: Frame, name: str) -> None:
    """The form of an evaluation. `name`: the run or checkpoint that is compared with its base."""
    content = "task: generation\nsave_dir: evaluation\n"
    folder = board.folder_of(name) if name else None
    given = "" if folder is None else (await run.io_bound(_text_of, folder) or "")
    model = (await run.io_bound(chat_models, board.root) or {}).get(name)
    if given or model:
        given = given or (model.run_file if model else "")
        results = as_yaml(f"{name}-evaluation", is_text=True)
        content = f"{given.rstrip()}\n\ntask: generation\ncompare: base\nsave_dir: {results}\n"
    frame.show(NewRun(frame, content, "eval").content)


def _text_of(folder: Path) -> str:
    """The run file of a run; empty for a folder without one, such as a checkpoint."""
    return read_run(folder).text
