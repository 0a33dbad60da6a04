"""The small parts that pages are made of. Every text is shown as it is; none is read as HTML."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from nicegui import run, ui
from nicegui.element import Element
from nicegui.elements.mixins.text_element import TextElement

Handler = Callable[..., Any]
PAUSE_SECONDS = 0.3


def text(content: str, tag: str = "span", classes: str = "") -> TextElement:
    return TextElement(tag=tag, text=content).classes(classes)


def box(tag: str = "div", classes: str = "") -> Element:
    return ui.element(tag).classes(classes)


def button(label: str, on_click: Handler, classes: str = "") -> TextElement:
    made = TextElement(tag="button", text=label).classes(f"button {classes}")
    made.props["type"] = "button"
    made.on("click", on_click, args=[])
    return made


def enable(made: Element, is_on: bool) -> None:
    """A button that cannot be used stays where it is."""
    if ("disabled" in made.props) == is_on:
        if is_on:
            del made.props["disabled"]
        else:
            made.props["disabled"] = True


def link(label: str, target: str, classes: str = "") -> TextElement:
    made = TextElement(tag="a", text=label).classes(classes)
    made.props["href"] = target
    return made


def show(made: TextElement, content: str) -> None:
    """Change a text, if it is another one."""
    if made.text != content:
        made.set_text(content)


class Input:
    """An input of HTML with its label. What the user types is never overwritten unless `set` is called.

    `on_change` gets the new value. The initial value is an attribute, since Vue would write a property back each time
    the page is drawn.
    """

    def __init__(self, element: Element, name: str, value: str, on_change: Handler, attributes: dict[str, Any]) -> None:
        self.value = value
        self._on_change = on_change
        self._property = "checked" if attributes.get("type") == "checkbox" else "value"
        self.element = element.classes("input")
        self.element.props.update({"id": name, "name": name, "autocomplete": "off", "spellcheck": "false"} | attributes)
        # A pause in typing is waited for. Nothing comes later than `change`, e.g. when a message has been sent already.
        for event, wait in (("input", f"setTimeout(tell, {1000 * PAUSE_SECONDS:.0f})"), ("change", "tell()")):
            reads = f"() => emit(String(input.{self._property}))"
            code = f"const input = event.target, tell = {reads}; clearTimeout(input.waits); input.waits = {wait};"
            self.element.on(event, self._changed, js_handler=f"(event) => {{ {code} }}")

    def set(self, value: str) -> None:
        if value == self.value:
            return
        self.value = value
        shown = json.dumps(value == "true" if self._property == "checked" else value)
        self.element.client.run_javascript(f"getElement({self.element.id}).{self._property} = {shown}")

    async def _changed(self, event: Any) -> None:
        if event.args == self.value:
            return
        self.value = event.args
        result = self._on_change(event.args)
        if result is not None:
            await result


def label_for(name: str, content: str) -> TextElement:
    made = text(content, "label")
    made.props["for"] = name
    return made


def text_input(
    name: str,
    value: str,
    on_change: Handler,
    *,
    hint: str = "",
    known: Callable[[], Sequence[str]] | None = None,
    kind: str = "text",
) -> Input:
    """`known`: gives values that are offered while typing; asked each time the input gets the focus.

    `kind`: the type of HTML's input, e.g. `range`.
    """
    attributes: dict[str, Any] = {"type": kind, "placeholder": hint}
    if value:
        attributes["^value"] = value
    if known is None:
        return Input(ui.element("input"), name, value, on_change, attributes)
    made = Input(ui.element("input"), name, value, on_change, attributes | {"list": f"known-{name}"})
    with box("datalist") as offered:
        offered.props["id"] = f"known-{name}"

    async def offer() -> None:
        items = await run.io_bound(known) or ()
        offered.clear()
        with offered:
            for item in items:
                box("option").props["value"] = item

    made.element.on("focus", offer, args=[])
    return made


def slider(name: str, value: float, most: float, on_change: Handler) -> Input:
    """From 0 to `most`, in a hundred steps."""
    made = text_input(name, str(value), on_change, kind="range")
    made.element.props.update({"min": 0, "max": most, "step": most / 100})
    return made


def area(name: str, value: str, on_change: Handler, rows: int = 20) -> Input:
    content = TextElement(tag="textarea", text=value)
    return Input(content, name, value, on_change, {"rows": rows, "wrap": "off"})


def choice(name: str, value: str, options: dict[str, str], on_change: Handler) -> Input:
    """`options`: value -> what is shown. The first is taken if `value` is none of them."""
    made = Input(ui.element("select"), name, value, on_change, {})
    with made.element:
        for option, shown in options.items():
            item = text(shown, "option")
            item.props["value"] = option
            if option == value:
                item.props["selected"] = True
    return made


def switch(name: str, is_on: bool, on_change: Handler) -> Input:
    """`on_change` gets `true` or `false`, as YAML writes them."""
    attributes: dict[str, Any] = {"type": "checkbox"} | ({"^checked": ""} if is_on else {})
    made = Input(ui.element("input"), name, "true" if is_on else "false", on_change, attributes)
    made.element.classes("switch", remove="input")
    return made


def table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    """A table of texts. It scrolls sideways by itself where the screen is narrow. `head` may be empty."""
    with box(classes="wide"), box("table"):
        text(caption, "caption", "unseen")
        if head:
            with box("thead"), box("tr"):
                for cell in head:
                    text(cell, "th")
        with box("tbody"):
            for row in rows:
                with box("tr"):
                    for cell in row:
                        text(cell, "td")


async def confirmed(question: str, yes: str, no: str) -> bool:
    """Ask in a dialog."""
    # Without a transition: a click on a button that still moves would close the dialog unanswered.
    with ui.dialog().props("transition-duration=0") as dialog, box(classes="card dialog"):
        text(question, "p")
        with box(classes="row end"):
            button(no, lambda: dialog.submit(False))
            button(yes, lambda: dialog.submit(True), "danger")
    answer = await dialog
    dialog.delete()
    return bool(answer)


def tell(message: str, kind: str = "negative") -> None:
    ui.notify(message, type=kind, position="bottom", multi_line=True, timeout=8000)  # type: ignore[arg-type]
