"""What environment variables say about the server. Those with the reference's names mean what they mean there."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from luthier.core.errors import InvalidInput
from luthier.infer.concurrency import MAX_CONCURRENT, max_concurrent

_YES = ("1", "true", "yes", "on", "y")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    host: str = "0.0.0.0"
    port: int = 8000
    """0 picks a free one."""
    keys: tuple[str, ...] = ()
    """A request must bring one of them; without any, nobody is asked."""
    model_name: str | None = None
    """None: the name of the model's folder."""
    is_verbose: bool = False
    """Whether requests and answers go to the log, with what people wrote."""
    root_path: str = ""
    """The path under which a proxy serves this server."""
    max_concurrent: int = MAX_CONCURRENT
    """Answers that are generated at the same time."""
    max_queue: int = 64
    """Answers that may wait for their turn."""
    cors_origins: tuple[str, ...] | None = None
    """Web pages that may call the server; None decides by the address: none on loopback, else all, without cookies."""

    media_folder: str | None = None
    """Requests may name images in this folder; None for no files of the server."""
    allows_urls: bool = False
    """Whether images on the web are fetched."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def allowed_origins(self) -> tuple[str, ...]:
        if self.cors_origins is not None:
            return self.cors_origins
        return () if self.is_local else ("*",)

    @property
    def shown_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


def from_environment(environ: Mapping[str, str]) -> ServerOptions:
    """Empty variables count as unset. Raises `InvalidInput` for a number that is none."""
    given = {name: value.strip() for name, value in environ.items() if value.strip()}
    folder = given.get("SAFE_MEDIA_PATH")
    if folder is not None and not os.path.isdir(folder):
        raise InvalidInput(f"SAFE_MEDIA_PATH: {folder} is not a folder -> name the folder with the images")
    if given.get("ALLOW_LOCAL_FILES", "1").lower() not in _YES:
        folder = None
    origins = given.get("API_CORS_ORIGINS")
    return ServerOptions(
        host=given.get("API_HOST", "0.0.0.0"),
        port=_number(given, "API_PORT", 8000, 0, 65535),
        keys=_listed(given.get("API_KEY", "")),
        model_name=given.get("API_MODEL_NAME"),
        is_verbose=given.get("API_VERBOSE", "0").lower() in _YES,
        root_path=given.get("FASTAPI_ROOT_PATH", ""),
        max_concurrent=max_concurrent(environ),
        max_queue=_number(given, "API_MAX_QUEUE", 64, 0, 1_000_000),
        media_folder=folder,
        allows_urls=given.get("API_ALLOW_URLS", "0").lower() in _YES,
        cors_origins=None if origins is None else _listed(origins),
    )


def _listed(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _number(given: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    text = given.get(name)
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
        raise InvalidInput(f"{name}: {text!r}: should be a whole number from {least} to {most}")
    return int(text)
