"""Ports that are free, and that the kernel gives to nobody else."""

import socket
from pathlib import Path

import pytest

from luthier.core import ports
from luthier.core.ports import HOST, free_port


def test_a_port_is_free_and_not_of_the_kernel(monkeypatch):
    found = [free_port() for _ in range(50)]
    assert len(set(found)) > 40
    kernel = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if kernel.exists() and (first := int(kernel.read_text().split()[0])) > ports.FIRST:
        assert all(ports.FIRST <= port < first for port in found)
    with socket.socket() as one:
        one.bind((HOST, found[0]))


def test_a_port_that_is_taken_is_passed_over(monkeypatch):
    with socket.socket() as taken:
        taken.bind((HOST, free_port()))
        number = taken.getsockname()[1]
        monkeypatch.setattr(ports, "FIRST", number)
        monkeypatch.setattr(ports, "_end_of_ours", lambda: number + 8)
        assert number not in {free_port() for _ in range(30)}


@pytest.mark.parametrize("text", ["1024 65535", None])
def test_where_the_kernel_gives_all_ports_or_does_not_say(tmp_path, monkeypatch, text):
    monkeypatch.setattr(ports, "_RANGE", tmp_path / "range")
    if text is not None:
        (tmp_path / "range").write_text(text)
    with socket.socket() as one:
        one.bind((HOST, free_port()))
