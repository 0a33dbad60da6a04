"""What all pages share: the folder that is shown, and what has been read of it. Nothing of a run is kept here."""

from collections import OrderedDict
from pathlib import Path

from luthier.webui.chat_models import ChatModel, LoadedModel
from luthier.webui.runs import LOG
from luthier.webui.watch import Curves

MAX_CURVES = 64


class Board:
    def __init__(self, root: Path, only: ChatModel | None = None) -> None:
        """`only`: the board is the chat with this model, and has no other page."""
        self.root, self.only = root, only
        self.models: dict[str, LoadedModel] = {}
        """Name -> the process of a model that somebody talks to."""
        self._curves: OrderedDict[Path, Curves] = OrderedDict()

    def close(self) -> None:
        """End the processes of the models. Runs go on."""
        for model in self.models.values():
            model.close()

    def curves(self, folder: Path) -> Curves:
        """The curves of a run. All pages share what has been read, so that many pages cost no more than one."""
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
        """The folder of an address; None if it is not below the root."""
        folder = self.root / name
        return folder if self.holds(folder) else None

    def holds(self, folder: Path) -> bool:
        """Whether a folder is below the root, whatever links and `..` it goes through."""
        return self.root in folder.resolve().parents
