"""Talk to one or two models with the same prompts: base and tuned, or any checkpoint."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from nicegui import run, ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

from luthier.core.errors import LuthierError, RunFailed
from luthier.webui.board import Board
from luthier.webui.chat_models import ChatModel, LoadedModel, chat_models
from luthier.webui.pages.frame import Frame
from luthier.webui.pages.parts import (
    Handler,
    area,
    box,
    button,
    choice,
    enable,
    label_for,
    link,
    show,
    text,
    text_input,
)

SIDES = ("a", "b")


@dataclass(slots=True)
class Answer:
    """What one model has said to one message."""

    about: str
    """Model and adapter."""
    thought: str = ""
    answer: str = ""
    calls: str = ""
    fault: str = ""


@dataclass(slots=True)
class Turn:
    message: str
    answers: dict[str, Answer] = field(default_factory=dict)
    """Side -> answer."""


class TalkEnd(Element, component="talk_end.js"):
    pass


class ChatPage:
    def __init__(self, frame: Frame, models: dict[str, ChatModel], chosen: str) -> None:
        self.frame, self.models = frame, models
        self.chosen = {"a": chosen if chosen in models else next(iter(models), ""), "b": ""}
        self.given = {"system": "", "tools": "", "message": "", "seed": "0", "temperature": "0", "max_tokens": "256"}
        self.turns: list[Turn] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.loading: set[str] = set()
        """The names of models that are being loaded."""
        self.places: dict[tuple[int, str, str], TextElement] = {}
        self.states: dict[str, TextElement] = {}

    def content(self) -> None:
        say = self.frame.say
        text(say("page.chat"), "h1")
        if not self.models:
            text(say("chat.none"), "p", "empty")
            link(say("page.new"), "/new", "button primary")
            return
        with box(classes="sides even"):
            for side in SIDES[: len(self.models)]:
                self._side(side)
        self._settings()
        self.talk()
        with box("section", "card composer"):
            label_for("message", say("chat.message"))
            self.message = area("message", self.given["message"], self._setter("message"), rows=2)
            with box(classes="row end"):
                button(say("chat.clear"), self._clear)
                self.buttons = {
                    "retry": button(say("chat.retry"), self._retry),
                    "stop": button(say("chat.stop"), self._stop),
                    "send": button(say("chat.send"), self._send, "primary"),
                }
        self.end = TalkEnd()
        self._enable()

    def _setter(self, name: str) -> Handler:
        def set_it(value: str) -> None:
            self.given[name] = value

        return set_it

    def _side(self, side: str) -> None:
        say = self.frame.say
        with box("section", "card side"):
            label_for(f"model-{side}", say(f"chat.{side}"))
            options = ({"": say("chat.nobody")} if side == "b" else {}) | {name: name for name in self.models}
            choice(f"model-{side}", self.chosen[side], options, lambda name: self._choose(side, name))
            with box(classes="row"):
                self.states[side] = text("", classes="faint grow")
                self.states[side].props["role"] = "status"
                button(say("chat.unload"), lambda: self._unload(side))
            self._show_state(side)

    def _settings(self) -> None:
        say = self.frame.say
        with box("details"):
            text(say("chat.settings"), "summary")
            label_for("system", say("chat.system"))
            area("system", self.given["system"], self._setter("system"), rows=2)
            label_for("tools", say("chat.tools"))
            area("tools", self.given["tools"], self._setter("tools"), rows=2).element.classes("code")
            with box(classes="row"):
                for name in ("seed", "temperature", "max_tokens"):
                    label_for(name, say(f"chat.{name}"))
                    text_input(name, self.given[name], self._setter(name)).element.props["size"] = 8

    def _choose(self, side: str, name: str) -> None:
        self.chosen[side] = name
        self._show_state(side)

    def _show_state(self, side: str) -> None:
        name, state = self.chosen[side], "unloaded"
        if name in self.loading:
            state = "loading"
        elif name in self.frame.board.models:
            state = "loaded"
        about = f"{self.frame.say(f'chat.{state}')} · {self.models[name].about}" if name in self.models else ""
        show(self.states[side], about)

    async def _unload(self, side: str) -> None:
        """End the process of a model, which frees its memory."""
        model = self.frame.board.models.pop(self.chosen[side], None)
        if model is not None:
            await run.io_bound(model.close)
        self._show_state(side)

    @ui.refreshable_method
    def talk(self) -> None:
        self.places.clear()
        with box("section", "talk") as whole:
            whole.props.update({"aria-live": "polite", "aria-label": self.frame.say("page.chat")})
            for number, turn in enumerate(self.turns):
                with box("div", "asked"):
                    text(turn.message, "p")
                    button(self.frame.say("chat.edit"), lambda number=number: self._edit(number), "quiet")
                with box(classes="sides even"):
                    for side, answer in turn.answers.items():
                        self._answer(number, side, answer)

    def _answer(self, number: int, side: str, answer: Answer) -> None:
        with box("article", "card answer"):
            text(answer.about, "div", "faint path")
            with box("details") as thoughts:
                text(self.frame.say("chat.thought"), "summary")
                self.places[number, side, "thought"] = text(answer.thought, "p", "faint")
            thoughts.set_visibility(bool(answer.thought))
            for kind, classes in (("answer", ""), ("calls", "code"), ("fault", "fault")):
                self.places[number, side, kind] = text(getattr(answer, kind), "p", f"said {classes}")

    async def _send(self) -> None:
        message = self.given["message"].strip()
        if not message or self._is_busy:
            return
        self.message.set("")
        self.given["message"] = ""
        await self._ask(message)

    async def _retry(self) -> None:
        if self.turns and not self._is_busy:
            await self._ask(self.turns.pop().message)

    def _edit(self, number: int) -> None:
        """Take a message back into the input, with all that came after it."""
        if not self._is_busy:
            self.given["message"] = self.turns[number].message
            self.message.set(self.turns[number].message)
            del self.turns[number:]
            self.talk.refresh()

    async def _ask(self, message: str) -> None:
        sides = [side for side in SIDES if self.chosen[side]]
        turn = Turn(message, {side: Answer(self.models[self.chosen[side]].about) for side in sides})
        self.turns.append(turn)
        self.talk.refresh()
        self.end.run_method("show")
        self.tasks = [asyncio.create_task(self._answer_of(side, turn)) for side in sides]
        self._enable()
        ended = await asyncio.gather(*self.tasks, return_exceptions=True)
        self.tasks = []
        self._enable()
        for fault in ended:
            if isinstance(fault, Exception):  # one of the board itself, which the log tells
                raise fault

    async def _answer_of(self, side: str, turn: Turn) -> None:
        number, answer = self.turns.index(turn), turn.answers[side]
        try:
            model = await self._loaded(side)
            async for kind, piece in model.answer(self._request(side)):
                setattr(answer, kind, getattr(answer, kind) + piece)
                place = self.places[number, side, kind]
                show(place, getattr(answer, kind))
                if kind == "thought" and place.parent_slot is not None:
                    place.parent_slot.parent.set_visibility(True)
        except LuthierError as fault:
            answer.fault = str(fault)
            show(self.places[number, side, "fault"], answer.fault)

    async def _loaded(self, side: str) -> LoadedModel:
        board, name = self.frame.board, self.chosen[side]
        if name not in board.models or not board.models[name].is_alive:
            self.loading.add(name)
            self._show_state(side)
        try:
            return await board.loaded(self.models[name], _start)
        finally:
            self.loading.discard(name)
            self._show_state(side)

    def _request(self, side: str) -> dict[str, Any]:
        """The conversation as this side has seen it. Raises `RunFailed` for a setting that is none."""
        messages = [{"role": "system", "content": self.given["system"]}] if self.given["system"].strip() else []
        for turn in self.turns[:-1]:
            messages.append({"role": "user", "content": turn.message})
            messages.append({"role": "assistant", "content": turn.answers[side].answer if side in turn.answers else ""})
        messages.append({"role": "user", "content": self.turns[-1].message})
        request: dict[str, Any] = {"messages": messages}
        try:
            request |= {name: json.loads(self.given[name]) for name in ("seed", "temperature", "max_tokens")}
            if self.given["tools"].strip():
                request["tools"] = json.loads(self.given["tools"])
        except (ValueError, RecursionError) as fault:
            raise RunFailed(f"{self.frame.say('chat.settings')}: {fault}") from None
        return request

    @property
    def _is_busy(self) -> bool:
        return any(not task.done() for task in self.tasks)

    def _stop(self) -> None:
        for task in self.tasks:
            task.cancel()

    def _clear(self) -> None:
        self._stop()
        self.turns.clear()
        self.talk.refresh()
        self._enable()

    def _enable(self) -> None:
        enable(self.buttons["send"], not self._is_busy)
        enable(self.buttons["stop"], self._is_busy)
        enable(self.buttons["retry"], not self._is_busy and bool(self.turns))


async def _start(model: ChatModel) -> LoadedModel:
    loaded = await run.io_bound(LoadedModel, model)
    if loaded is None:
        raise RunFailed("the board is ending")
    return loaded


async def build(board: Board, frame: Frame, model: str) -> None:
    found = {board.only.name: board.only} if board.only else await run.io_bound(chat_models, board.root)
    frame.show(ChatPage(frame, found or {}, model).content)
