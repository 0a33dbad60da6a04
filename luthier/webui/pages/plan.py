"""The plan beside the form: memory, time, and whether it fits. It is made while the pane is open, after each change."""

import asyncio
from collections.abc import Callable

from nicegui.events import GenericEventArguments

from luthier.core.errors import LuthierError
from luthier.webui.commands import plan_of
from luthier.webui.pages.frame import Frame
from luthier.webui.pages.parts import box, show, text

QUIET_SECONDS = 1.5
"""Nothing is planned while somebody types."""


class PlanPane:
    def __init__(self, frame: Frame, wanted: Callable[[], str]) -> None:
        """`wanted`: the text to plan for; empty while it has problems."""
        self.frame, self._wanted = frame, wanted
        self._task: asyncio.Task[None] | None = None
        self._is_open = False
        self._planned = ""

    def content(self) -> None:
        say = self.frame.say
        with box("details") as pane:
            text(say("plan.title"), "summary")
            self.state = text(say("plan.waiting"), "p", "faint")
            self.state.props["role"] = "status"
            self.lines = text("", "pre", "log plan")
            self.lines.props.update({"tabindex": 0, "aria-label": say("plan.title")})
        self._is_open, self._planned = False, ""
        pane.on("toggle", self._toggled, js_handler="(event) => emit(event.target.open)")

    def _toggled(self, event: GenericEventArguments) -> None:
        self._is_open = bool(event.args)
        self.changed()

    def changed(self) -> None:
        """The text may be another one. A plan that is being made for the former one is given up."""
        wanted = self._wanted()
        if not self._is_open or wanted == self._planned:
            return
        if self._task is not None:
            self._task.cancel()
        self._planned = wanted
        self._task = asyncio.create_task(self._plan(wanted)) if wanted else None
        show(self.state, self.frame.say("plan.running" if wanted else "plan.waiting"))

    async def _plan(self, wanted: str) -> None:
        await asyncio.sleep(QUIET_SECONDS)
        try:
            plan = await plan_of(wanted)
        except LuthierError as fault:
            show(self.state, str(fault))
            return
        show(self.state, self.frame.say("plan.made"))
        show(self.lines, "\n".join(line for line in plan.splitlines() if not line.startswith("  model.")))
