"""Ports for programs that must be told one before they listen, such as torchrun and servers of models."""

from pathlib import Path

HOST = "127.0.0.1"
FIRST, END = 20_000, 32_768
"""Ray gives those below `FIRST` to its workers, and Linux those from `END` on to anybody, unless told otherwise."""
_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")


def free_port() -> int:
    """A port of the loopback address that nobody listens on.

    It lies below those that the kernel gives to connections and to servers that ask for any port. The program that is
    told it may import libraries for seconds before it listens, and by then one of those may have been given away.
    """
    import random
    import socket

    end = _end_of_ours()
    while True:
        # Not the generator that seeds are set for: runs with the same seed would choose the same port.
        port = random.SystemRandom().randrange(FIRST, end) if end > FIRST else 0
        with socket.socket() as one:
            try:
                one.bind((HOST, port))
            except OSError:  # it is taken
                continue
            return int(one.getsockname()[1])


def _end_of_ours() -> int:
    try:
        return min(int(_RANGE.read_text("ascii").split()[0]), END)
    except OSError:  # not Linux
        return END
