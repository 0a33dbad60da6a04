"""Holds a process of a test where the test wants it, however fast the machine is: see `tests.holding`.

Python imports this module when it starts, from PYTHONPATH. The standard library must suffice, and nothing is done
unless the environment asks for it.
"""

import os
import sys
import time
from typing import Any

_END, _FOLDER = os.environ.get("TEST_HELD_BEFORE"), os.environ.get("TEST_HELD_FOLDER", "")


def _hold(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "os.rename" and os.fsdecode(arguments[1]).endswith(str(_END)):
        with open(os.path.join(_FOLDER, "is held"), "w"):
            pass
        while not os.path.exists(os.path.join(_FOLDER, "goes on")):
            time.sleep(0.01)


if _END:
    sys.addaudithook(_hold)
