"""Where the board listens and which folder it shows, from the command line and the variables of the reference."""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from luthier.core.errors import InvalidInput, OutputError

PORT = 7860
_UNREAD = {
    "GRADIO_IPV6": "set GRADIO_SERVER_NAME=:: to listen on all addresses",
    "GRADIO_SHARE": "there is no public link; use a tunnel or a proxy",
    "GRADIO_ROOT_PATH": "let the proxy give the pages a host name of their own",
}
"""Variable of the reference -> what to do instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoardOptions:
    host: str = "127.0.0.1"
    port: int = PORT
    """0 picks a free one."""
    root: Path = Path()
    """The working folder of all runs. Only what is below it is shown."""

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the board."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @property
    def shown_host(self) -> str:
        return f"[{self.host}]" if ":" in self.host else self.host


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise InvalidInput(f"{self.prog}: {message}")


def unread_variables(environ: Mapping[str, str]) -> Iterator[str]:
    """What to say of variables of the reference that ask for something the board does not have."""
    for name, remedy in _UNREAD.items():
        if environ.get(name, "").strip().lower() not in ("", "0", "false", "n", "no"):
            yield f"{name} is not read -> {remedy}"


def from_words(words: Sequence[str], environ: Mapping[str, str]) -> BoardOptions:
    """Words of the command line take precedence over GRADIO_SERVER_NAME and GRADIO_SERVER_PORT.

    Raises `InvalidInput` for a word or a number that is none, and `OutputError` for a root that cannot be used.
    """
    parser = _Parser(
        "webui",
        usage="luthier webui [--host H] [--port P] [--root DIR]",
        description="Start, watch and compare runs in a browser. The link that is printed holds the token.",
    )
    parser.add_argument(
        "--host",
        default=environ.get("GRADIO_SERVER_NAME", "").strip() or "127.0.0.1",
        help="address to listen on (GRADIO_SERVER_NAME, else 127.0.0.1: this machine alone)",
    )
    parser.add_argument(
        "--port",
        default=environ.get("GRADIO_SERVER_PORT", "").strip() or str(PORT),
        help=f"port, or the next free one; 0 picks any (GRADIO_SERVER_PORT, else {PORT})",
    )
    parser.add_argument("--root", default=".", help="folder whose runs are shown (the working folder)")
    given = parser.parse_args(list(words))
    if not (given.port.isascii() and given.port.isdigit() and int(given.port) <= 65535):
        raise InvalidInput(f"webui: --port {given.port}: should be a whole number from 0 to 65535")
    root = Path(given.root).expanduser().resolve()
    if not root.is_dir():
        raise OutputError(f"webui: --root {given.root}: is not a folder -> create it, or name another one")
    return BoardOptions(host=given.host, port=int(given.port), root=root)
