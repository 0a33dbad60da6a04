"""Ports for programs that must be told one before they listen.

They lie below those that the kernel gives to connections and to servers that ask for any, so nobody is given one before
the program has it.
"""

import itertools
import os
import socket
from pathlib import Path

FIRST, RANGE = 10_000, Path("/proc/sys/net/ipv4/ip_local_port_range")
_LAST = min(int(RANGE.read_text().split()[0]), 32_768) - 1 if RANGE.exists() else 32_767
# Workers of pytest-xdist are processes with numbers close to each other, so each begins far from the others.
_candidates = itertools.count(os.getpid() * 97)


def free_port() -> int:
    """A port of this machine that nobody uses, and that no other call has been given or will soon be given."""
    for number in _candidates:
        port = FIRST + number % (_LAST - FIRST)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
    raise AssertionError
