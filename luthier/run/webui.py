"""`luthier webui`: pages in a browser. `ready: http://HOST:PORT/?token=...` on stdout when they can be opened."""

import os
import secrets
from typing import TYPE_CHECKING

from luthier.core.files import require_writable
from luthier.core.log import warn
from luthier.core.versions import is_installed, missing_extra

if TYPE_CHECKING:
    from luthier.webui.chat_models import ChatModel
    from luthier.webui.options import BoardOptions


def main(argv: list[str]) -> int:
    """Serve until a signal comes. Raises `LuthierError` for an address or a root that cannot be used."""
    from luthier.webui.options import from_words

    options = from_words(argv, os.environ)
    require_libraries("webui")
    require_writable("webui: --root", options.root)
    os.chdir(options.root)  # relative paths in run files are those of the root
    return serve_board(options)


def require_libraries(command: str) -> None:
    """Raises `MissingExtra` if the libraries of the board are not installed."""
    for module in ("nicegui", "fastapi", "uvicorn"):
        if not is_installed(module):
            raise missing_extra(module, "board", command)


def serve_board(options: "BoardOptions", only: "ChatModel | None" = None) -> int:
    """Serve the pages below `options.root`, or the chat with one model, until a signal comes."""
    from luthier.webui.app import build
    from luthier.webui.board import Board
    from luthier.webui.gate import Gate
    from luthier.webui.options import unread_variables
    from luthier.webui.server import listening_socket, serve

    for line in unread_variables(os.environ):
        warn(line)
    if not options.is_local:
        warn(f"everyone who can reach {options.host} and has the token can run programs here")
    token = secrets.token_urlsafe(24)
    listening = listening_socket(options)
    port = listening.getsockname()[1]
    board = Board(options.root, only)
    app = Gate(build(board), token, options.host, port)
    try:
        serve(app, listening, lambda: print(f"ready: http://{options.shown_host}:{port}/?token={token}", flush=True))
    finally:
        board.close()
    return 0
