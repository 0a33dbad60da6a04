"""A taken port is passed over, and the next one is used."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from luthier.core.errors import OutputError
from luthier.webui import server
from luthier.webui.options import BoardOptions


def test_the_next_free_port_is_taken_and_said(said):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with server.listening_socket(BoardOptions(port=port)) as found:
            assert port < found.getsockname()[1] <= port + server.MAX_PORTS
            assert said == [f"warning: port {port} is taken; the board is on {found.getsockname()[1]}"]


def test_no_port_is_free(monkeypatch):
    monkeypatch.setattr(server, "MAX_PORTS", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OutputError, match="are taken -> set --port"):
            server.listening_socket(BoardOptions(port=taken.getsockname()[1]))


def test_an_address_of_another_machine():
    with pytest.raises(OutputError, match="cannot be listened on"):
        server.listening_socket(BoardOptions(host="192.0.2.1", port=0))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_models_and_the_board(tmp_path, number, status):
    """Uvicorn alone would raise SIGTERM again, and what follows `serve` would not run."""
    code = (
        "import sys; from luthier.cli import main; from luthier.webui.board import Board\n"
        "Board.close = lambda self: print('closed', flush=True)\n"
        f"sys.exit(main(['webui', '--port', '0', '--root', {str(tmp_path)!r}]))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as board:
        assert board.stdout is not None and board.stdout.readline().startswith("ready: http://")
        board.send_signal(number)
        assert board.stdout.read() == "closed\n"
        assert board.wait(timeout=60) == status
