"""Models of ModelScope and Modelers: fetched as a whole, once in a process, by the hub's own library.

transformers and peft know the Hugging Face hub only, so what they are given is the folder that the library made. Names
stay what the user wrote: adapters record them, and the same name is fetched once. Nothing here imports torch.
"""

import importlib
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.keys.hubs import Hub, hub_in_use
from luthier.core.errors import ModelError
from luthier.core.log import info
from luthier.core.paths import cache_root
from luthier.core.versions import require

if TYPE_CHECKING:
    from luthier.config.keys.model import ModelConfig

_FOLDERS: dict[tuple[Hub, str], str] = {}
"""(hub, name) -> the folder it was fetched to. The environment of this process may ask for another hub later."""


@dataclass(frozen=True, slots=True)
class HubAccess:
    """How files are fetched from a hub."""

    revision: str = "main"
    cache_dir: str | None = None
    token: str | None = field(default=None, repr=False)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every function of the hub's library that fetches."""
        return {"revision": self.revision, "cache_dir": self.cache_dir, "token": self.token}


NO_ACCESS = HubAccess()
"""The main branch of public repositories, kept in the default cache."""


def hub_token(keys: "ModelConfig") -> str | None:
    """The token for the hub that is in use."""
    match hub_in_use():
        case Hub(token_key="ms_hub_token"):
            return keys.ms_hub_token
        case Hub(token_key="om_hub_token"):
            return keys.om_hub_token
        case _:
            return keys.hf_hub_token


def hub_access(keys: "ModelConfig") -> HubAccess:
    """How a run fetches files of its model, its tokenizer and its adapters."""
    return HubAccess(keys.model_revision, keys.cache_dir, hub_token(keys))


def not_fetched(name: str, part: str, reason: str) -> ModelError:
    """The error for a `part` (config, tokenizer, weights) of a repository of Hugging Face."""
    return ModelError(
        f"{name}: there is no folder of this name here, and its {part} cannot be fetched from the hub ({reason})"
        " -> give the path of a folder or a .gguf file, or check the name, the network and hf_hub_token"
    )


def local_name(name: str, access: HubAccess) -> str:
    """The folder of the hub id `name`, fetched if the environment asks for another hub; else `name` itself.

    Raises `ModelError` where the hub does not give it, and `MissingExtra` without its library.
    """
    hub = hub_in_use()
    if hub is None:
        return name
    _FOLDERS[hub, name] = _fetch(hub, name, access)
    return _FOLDERS[hub, name]


def fetched(name: str) -> str:
    """The folder that this process has fetched `name` to from the hub that is in use, or `name` itself."""
    hub = hub_in_use()
    return name if hub is None else _FOLDERS.get((hub, name), name)


@cache
def _fetch(hub: Hub, name: str, access: HubAccess) -> str:
    from filelock import FileLock  # would slow down every command

    client = require(hub.module, hub.extra, f"{name}: {hub.variable}, which asks for models of {hub.title},")
    # Not all of what a library raises is of one of Python's kinds.
    own = vars(importlib.import_module(hub.errors)).values() if hub.errors else ()
    errors = (OSError, ValueError, RuntimeError, *(kind for kind in own if _is_error(kind)))
    revision = hub.main_branch if access.revision == "main" else access.revision
    words = {"revision": revision, "cache_dir": access.cache_dir}
    fault: BaseException | None = None
    reason = unreachable(hub)
    if not reason:
        try:
            with FileLock(_lock_file(hub, name, access.cache_dir)):
                return str(client.snapshot_download(name, token=access.token, **words))
        except errors as error:
            fault, reason = error, _gist(error)
    try:
        found = str(client.snapshot_download(name, local_files_only=True, **words))
    except errors:
        found = ""
    if not found:
        raise ModelError(
            f"{name}: there is no folder of this name here, and {hub.title} does not give one ({reason}) -> check the"
            f" name, model_revision, the network and {hub.token_key}, or unset {hub.variable}"
        ) from fault
    info(f"{name}: taken from what was fetched before, since {hub.title} does not answer ({reason})")
    return found


def unreachable(hub: Hub) -> str:
    """Why the hub cannot be asked, or the empty text. Its library would try again and again for half a minute."""
    from urllib.request import getproxies

    if getproxies() or any(os.environ.get(variable) for variable in hub.host_variables):
        return ""
    fault = resolution_fault(hub.host)
    return f"{hub.host}: {fault}" if fault else ""


def resolution_fault(host: str) -> str:
    """Why the name of a host leads nowhere, or the empty text."""
    import socket

    try:
        socket.getaddrinfo(host, 443)
    except OSError as fault:
        return fault.strerror or str(fault)
    return ""


def _lock_file(hub: Hub, name: str, cache_dir: str | None) -> Path:
    """The processes of a distributed run ask for the same model at the same time."""
    folder = cache_root() if cache_dir is None else Path(cache_dir).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{hub.module}--{name.replace('/', '--')}.lock"


def _is_error(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Exception)


def _gist(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
