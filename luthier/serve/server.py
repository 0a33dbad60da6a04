"""Runs the application. The socket is open before the model is loaded; the server ends after its running answers, or
when the model answers nothing any more."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from luthier.core.errors import LuthierError, OutputError, RunFailed
from luthier.core.log import info
from luthier.serve.app import Service
from luthier.serve.model import ChatModel, Loaded, RewardModel
from luthier.serve.options import ServerOptions

DRAIN_SECONDS = 30.0
"""How long running answers may take after SIGTERM."""
_KEEP_ALIVE_SECONDS, _CLOSING_SECONDS, _TICK_SECONDS, _WATCH_SECONDS = 60, 3, 0.05, 0.5
_BACKLOG = 2048


class _Server(uvicorn.Server):
    """Leaves signals to us: uvicorn would close the socket at once and end the process with the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listening_socket(options: ServerOptions) -> socket.socket:
    """Raises `OutputError` if the address cannot be used."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((options.host, options.port))
        server.listen(_BACKLOG)
    except OSError as fault:
        server.close()
        raise OutputError(
            f"API_HOST={options.host} API_PORT={options.port}: cannot be listened on ({fault.strerror})"
            " -> choose another port, or 0 for a free one"
        ) from fault
    server.setblocking(False)
    return server


class Running:
    """The server with its model. For the main thread."""

    def __init__(self, app: FastAPI, service: Service, options: ServerOptions, load: Callable[[], Loaded]) -> None:
        self._service, self._options, self._load = service, options, load
        config = uvicorn.Config(
            app,
            log_level="error",
            access_log=False,
            ws="none",
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=_CLOSING_SECONDS,
        )
        self._server = _Server(config)
        self._release: Callable[[], None] | None = None
        self._watching: asyncio.Task[None] | None = None
        self._fault: LuthierError | None = None
        self._was_interrupted = False
        self.drain_seconds = DRAIN_SECONDS

    def run(self, listening: socket.socket) -> int:
        """Serve until a signal comes; return the exit status.

        Raises what loading the model raised, and `RunFailed` when it answers nothing any more.
        """
        asyncio.run(self._run(listening))
        if self._fault is not None:
            raise self._fault
        status = 130 if self._was_interrupted else 0
        if self._loading.is_alive():
            # It cannot be stopped, and a thread that is alive while Python ends prints errors.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status

    async def _run(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        port = listening.getsockname()[1]
        self._loading = threading.Thread(target=self._load_apart, args=(loop, port), daemon=True, name="loading")
        self._loading.start()
        try:
            await self._server.serve([listening])
        finally:
            if self._watching is not None:  # an engine that is released looks like one that has died
                self._watching.cancel()
            if self._release is not None:
                await asyncio.to_thread(self._release)

    def _load_apart(self, loop: asyncio.AbstractEventLoop, port: int) -> None:
        loaded = None
        try:
            loaded = self._load()
        except LuthierError as fault:
            self._fault = fault
        finally:
            with contextlib.suppress(RuntimeError):  # the server has been stopped meanwhile, and its loop is closed
                loop.call_soon_threadsafe(self._loaded, loaded, port)

    def _loaded(self, loaded: Loaded | None, port: int) -> None:
        if loaded is None:
            self._fault = self._fault or RunFailed("the model could not be loaded")
            self._exit()
            return
        self._service.model, self._release = loaded
        if self._server.should_exit:  # stopped while the model was loaded
            return
        print(f"ready: http://{self._options.shown_host}:{port}/v1", flush=True)
        self._watching = asyncio.get_running_loop().create_task(self._watch(loaded[0]))

    async def _watch(self, model: ChatModel | RewardModel) -> None:
        """End the server when the model answers nothing any more, so that whoever keeps it alive starts a new one."""
        while model.fault is None:
            await asyncio.sleep(_WATCH_SECONDS)
        self._fault = RunFailed(model.fault)
        await self._drain(_CLOSING_SECONDS)  # running answers end with the same error

    def _stop(self, number: int) -> None:
        self._was_interrupted = self._was_interrupted or number == signal.SIGINT
        if self._service.admission.is_stopping:  # asked for a second time
            self._server.force_exit = True
            self._exit()
            return
        self._service.admission.is_stopping = True
        if self._service.admission.num_answers:
            info(f"stopping; running answers get {self.drain_seconds:.0f} s")
        self._draining = asyncio.get_running_loop().create_task(self._drain(self.drain_seconds))

    async def _drain(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._service.admission.num_answers:
                    await asyncio.sleep(_TICK_SECONDS)
        self._service.abort()
        self._exit()

    def _exit(self) -> None:
        self._server.should_exit = True
