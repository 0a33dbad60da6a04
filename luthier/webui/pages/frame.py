"""What stands around every page: its name, the ways to the other pages, language and theme."""

from collections.abc import Callable, Mapping
from typing import Any

from fastapi import Request
from nicegui import ui
from nicegui.element import Element

from luthier import __version__
from luthier.webui.board import Board
from luthier.webui.pages.parts import box, button, choice, link, text
from luthier.webui.texts import LANGUAGES, preferred, texts

PAGES = {
    "runs": "/",
    "new": "/new",
    "compare": "/compare",
    "data": "/data",
    "chat": "/chat",
    "evaluate": "/evaluate",
    "export": "/export",
}
"""Name in the locales -> address."""
LANGUAGE_COOKIE, THEME_COOKIE = "luthier_language", "luthier_theme"
THEMES: Mapping[str, bool | None] = {"auto": None, "light": False, "dark": True}
_YEAR_SECONDS = 365 * 24 * 3600


class Frame:
    """One open page of one browser. Only its language and theme are kept here."""

    def __init__(self, board: Board, request: Request, page: str) -> None:
        self.board, self.page = board, page
        self.language = preferred(request.cookies.get(LANGUAGE_COOKIE), request.headers.get("accept-language", ""))
        theme = request.cookies.get(THEME_COOKIE, "auto")
        self.theme = theme if theme in THEMES else "auto"
        self._dark = ui.dark_mode(THEMES[self.theme])
        self._title = ""

    def say(self, key: str) -> str:
        """A text of `locales/` in the language of this page."""
        return texts(self.language)[key]

    def show(self, content: Callable[[], Any], title: str = "") -> None:
        """Draw the page. `content` is called again when the language changes, so it keeps nothing that was typed."""
        self._title = title

        @ui.refreshable
        def whole() -> None:
            ui.page_title(f"{self._title or self.say(f'page.{self.page}')} · Luthier")
            ui.run_javascript(f"document.documentElement.lang = '{self.language}'")
            self._head()
            with box("main", "page") as main:
                content()
            _use_once_connected(main)

        self._redraw = whole.refresh
        whole()

    def _head(self) -> None:
        with box("header"):
            link("Luthier", "/", "brand")
            with box("nav") as ways:
                ways.props["aria-label"] = self.say("frame.pages")
                for name, address in ({} if self.board.only else PAGES).items():
                    way = link(self.say(f"page.{name}"), address)
                    if name == self.page:
                        way.props["aria-current"] = "page"
            with box(classes="settings") as settings:
                languages = choice("language", self.language, dict(LANGUAGES), self._set_language)
                languages.element.props["aria-label"] = self.say("frame.language")
                themes = button(self.say(f"frame.{self.theme}"), self._next_theme, "quiet")
                themes.props["title"] = self.say("frame.theme")
                text(__version__, classes="faint version")
            _use_once_connected(settings)

    def _set_language(self, language: str) -> None:
        self.language = language
        _keep(LANGUAGE_COOKIE, language)
        self._redraw()

    def _next_theme(self) -> None:
        names = list(THEMES)
        self.theme = names[(names.index(self.theme) + 1) % len(names)]
        self._dark.set_value(THEMES[self.theme])
        _keep(THEME_COOKIE, self.theme)
        self._redraw()


def _use_once_connected(part: Element) -> None:
    """Let nobody click or type in a part of a page that is not connected yet, since NiceGUI drops such events."""
    if not part.client.has_socket_connection:
        part.props["inert"] = True
        part.client.on_connect(lambda: part.props.pop("inert", None))


def _keep(cookie: str, value: str) -> None:
    ui.run_javascript(f"document.cookie = '{cookie}={value}; path=/; max-age={_YEAR_SECONDS}; samesite=strict'")
