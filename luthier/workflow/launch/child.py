"""A process of luthier that ends with the process that started it, even if that is killed (Linux).

    python -m luthier.workflow.launch.child PARENT train run.yaml

`PARENT` is the number of the process that starts it. Signals that the parent blocks or ignores arrive as always.
"""

import os
import runpy
import signal
import sys
from collections.abc import Sequence

from luthier.core.signals import end_with_parent


def command_of(words: Sequence[str]) -> list[str]:
    """The command line of a child that runs `luthier` with `words`."""
    return [sys.executable, "-m", "luthier.workflow.launch.child", str(os.getpid()), *words]


def main(parent: int, words: Sequence[str]) -> None:
    end_with_parent()
    if os.getppid() != parent:  # it ended before that
        os._exit(1)
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    sys.argv = ["luthier", *words]
    runpy.run_module("luthier", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
