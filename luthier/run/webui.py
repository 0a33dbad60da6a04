"""`luthier webui`: pages in a browser. `ready: http://HOST:PORT/?token=...` on stdout when they can be opened."""

import os
import secrets

from luthier.core.files import require_writable
from luthier.core.log import warn
from luthier.core.versions import is_installed, missing_extra


def main(argv: list[str]) -> int:
    """Serve until a signal comes. Raises `LuthierError` for an address or a root that cannot be used."""
    from luthier.webui.options import from_words

    options = from_words(argv, os.environ)
    for module in ("nicegui", "fastapi", "uvicorn"):
        if not is_installed(module):
            raise missing_extra(module, "board", "webui")
    require_writable("webui: --root", options.root)
    os.chdir(options.root)  # relative paths in run files are those of the root
    if not options.is_local:
        warn(f"everyone who can reach {options.host} and has the token can run programs here")

    from luthier.webui.app import build
    from luthier.webui.board import Board
    from luthier.webui.gate import Gate
    from luthier.webui.server import listening_socket, serve

    token = secrets.token_urlsafe(24)
    listening = listening_socket(options)
    port = listening.getsockname()[1]
    board = Board(options.root)
    app = Gate(build(board), token, options.host, port)
    try:
        serve(app, listening, lambda: print(f"ready: http://{options.shown_host}:{port}/?token={token}", flush=True))
    finally:
        board.close()
    return 0
