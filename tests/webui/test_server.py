"""A taken port is passed over, and the next one is used."""

import socket

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
