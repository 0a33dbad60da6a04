"""The pages at their addresses, as one application."""

from pathlib import Path

from fastapi import FastAPI, Query, Request
from nicegui import ui

from luthier.config.key_table import catalog
from luthier.webui.board import Board
from luthier.webui.pages import chat, compare, data, new_run, runs
from luthier.webui.pages import run as run_page
from luthier.webui.pages.frame import Frame

_STYLE = Path(__file__).with_name("style.css")
_ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><rect width="16" height="16" rx="3" fill="#2f5d8a"/>'
    '<path d="M5 3v10h6" fill="none" stroke="#fff" stroke-width="2"/></svg>'
)


def build(board: Board) -> FastAPI:
    """The application without its gate. Called once in a process, since NiceGUI has one table of pages."""
    app = FastAPI(title="luthier webui", docs_url=None, redoc_url=None, openapi_url=None)
    ui.add_css(_STYLE.read_text(encoding="utf-8"), shared=True)

    if board.only is None:
        catalog()  # read here, so that nobody waits for it at the first form
        _add_pages(board)
    else:

        @ui.page("/")
        async def _(request: Request) -> None:
            await chat.build(board, Frame(board, request, "chat"), "")

    ui.run_with(
        app, title="Luthier", favicon=_ICON, dark=None, tailwind=False, show_welcome_message=False, reconnect_timeout=30
    )
    return app


def _add_pages(board: Board) -> None:
    @ui.page("/")
    async def _(request: Request) -> None:
        await runs.build(board, Frame(board, request, "runs"))

    @ui.page("/new")
    async def _(request: Request, file: str = "") -> None:
        await new_run.build(board, Frame(board, request, "new"), file)

    @ui.page("/export")
    async def _(request: Request, model: str = "") -> None:
        await new_run.build_export(board, Frame(board, request, "export"), model)

    @ui.page("/evaluate")
    async def _(request: Request, model: str = "") -> None:
        await new_run.build_evaluation(board, Frame(board, request, "evaluate"), model)

    @ui.page("/run/{name:path}")
    async def _(request: Request, name: str) -> None:
        await run_page.build(board, Frame(board, request, "run"), name)

    @ui.page("/compare")
    async def _(request: Request, run: list[str] = Query(default=[])) -> None:  # noqa: B008
        await compare.build(board, Frame(board, request, "compare"), run)

    @ui.page("/data")
    async def _(request: Request) -> None:
        await data.build(board, Frame(board, request, "data"))

    @ui.page("/chat")
    async def _(request: Request, model: str = "") -> None:
        await chat.build(board, Frame(board, request, "chat"), model)
