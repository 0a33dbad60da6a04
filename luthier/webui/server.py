"""Runs the board until a signal comes. `ready: http://HOST:PORT/?token=...` on stdout when it answers."""

import errno
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from luthier.core.errors import OutputError
from luthier.core.log import warn
from luthier.webui.options import BoardOptions

MAX_PORTS = 100
"""So many ports after a taken one are tried."""
_CLOSING_SECONDS = 2
_BACKLOG = 128


def listening_socket(options: BoardOptions) -> socket.socket:
    """On the port that was asked for, or on the next free one. Raises `OutputError` if there is none."""
    last = min(options.port + MAX_PORTS, 65535) if options.port else 0
    for port in range(options.port, last + 1):
        try:
            found = _listen(options.host, port)
        except OSError as fault:
            if fault.errno != errno.EADDRINUSE:
                raise OutputError(
                    f"webui: {options.host}:{port}: cannot be listened on ({fault.strerror}) -> set --host and --port"
                ) from fault
            continue
        if port != options.port:
            warn(f"port {options.port} is taken; the board is on {port}")
        return found
    raise OutputError(f"webui: the ports {options.port} to {last} are taken -> set --port, or 0 for a free one")


def _listen(host: str, port: int) -> socket.socket:
    server = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((host, port))
        server.listen(_BACKLOG)
    except OSError:
        server.close()
        raise
    return server


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, tell: Callable[[], None]) -> None:
        super().__init__(config)
        self._tell = tell

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._tell()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As in uvicorn, which however ends the process with SIGTERM, so that the models' processes would not be ended.

        Raises `KeyboardInterrupt` after Ctrl-C.
        """
        seen = []

        def take(number: int, frame: FrameType | None) -> None:
            seen.append(number)
            self.handle_exit(number, frame)

        before = {number: signal.signal(number, take) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if signal.SIGINT in seen:
            raise KeyboardInterrupt


def serve(app: ASGIApp, listening: socket.socket, tell: Callable[[], None]) -> None:
    """`tell` is called when the pages can be opened."""
    config = uvicorn.Config(
        app, log_level="error", access_log=False, timeout_graceful_shutdown=_CLOSING_SECONDS, lifespan="on"
    )
    _Server(config, tell).run(sockets=[listening])
