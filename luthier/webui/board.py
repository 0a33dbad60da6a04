"""What all pages share: the folder that is shown, and what has been read of it. Nothing of a run is kept here."""

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from pathlib import Path
from threading import Lock

from luthier.webui.chat_models import ChatModel, LoadedModel
from luthier.webui.runs import LOG, Run, find_runs
from luthier.webui.watch import Curves

MAX_CURVES = 64
LISTED_SECONDS = 1.0
"""So long a list of the runs is used again. Many pages that look at the same time cost no more than one."""


class Board:
    def __init__(self, root: Path, only: ChatModel | None = None) -> None:
        """`only`: the board is the chat with this model, and has no other page."""
        self.root, self.only = root, only
        self.models: dict[str, LoadedModel] = {}
        """Name -> the process of a model that somebody talks to."""
        self._starting: dict[str, asyncio.Lock] = {}
        self._curves: OrderedDict[Path, Curves] = OrderedDict()
        self._listed: tuple[float, list[Run]] = (float("-inf"), [])
        self._list_lock = Lock()

    def runs(self) -> list[Run]:
        """Every run below the root, the latest first."""
        with self._list_lock:
            if time.monotonic() - self._listed[0] > LISTED_SECONDS:
                self._listed = (time.monotonic(), find_runs(self.root))
            return self._listed[1]

    async def loaded(self, model: ChatModel, start: Callable[[ChatModel], Awaitable[LoadedModel]]) -> LoadedModel:
        """The process of a model, which is started unless it runs. Pages that ask meanwhile wait for the same one."""
        async with self._starting.setdefault(model.name, asyncio.Lock()):
            if model.name not in self.models or not self.models[model.name].is_alive:
                self.models[model.name] = await start(model)
            return self.models[model.name]

    def close(self) -> None:
        """End the processes of the models. Runs go on."""
        for model in self.models.values():
            model.close()

    def curves(self, folder: Path) -> Curves:
        """The curves of a run. All pages share what has been read."""
        if folder not in self._curves:
            self._curves[folder] = Curves(folder / LOG)
        self._curves.move_to_end(folder)
        while len(self._curves) > MAX_CURVES:
            self._curves.popitem(last=False)
        return self._curves[folder]

    def name_of(self, folder: Path) -> str:
        """The folder as part of an address: its path below the root."""
        return folder.relative_to(self.root).as_posix()

    def folder_of(self, name: str) -> Path | None:
        """The folder of an address; None if it is not below the root, or if no folder can have this name."""
        folder = self.root / name
        try:
            folder.lstat()
        except (FileNotFoundError, NotADirectoryError):
            pass  # the page says that nothing is there
        except (OSError, ValueError):  # too long a name, or a null character
            return None
        return folder if self.holds(folder) else None

    def holds(self, folder: Path) -> bool:
        """Whether a folder is below the root, whatever links and `..` it goes through."""
        return self.root in Path(os.path.realpath(folder)).parents  # Path.resolve raises for a link to itself
