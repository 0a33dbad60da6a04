"""What luthier says while it works. Everything goes to stderr; stdout is for results.

Only the first process of a distributed run speaks. `LLAMAFACTORY_VERBOSITY` sets the level, as in the reference.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

LOGGER = logging.getLogger("luthier")


class _Stderr(logging.StreamHandler):
    """Looks `sys.stderr` up at every record, so that a redirection made later is honored."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def set_up() -> None:
    """Attach the handler once; called by the CLI and by the Python API."""
    if LOGGER.handlers:
        return
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.propagate = False
    # bitsandbytes, which peft imports where it is installed, tells everybody of a faster kernel to be downloaded.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    level = os.environ.get("LLAMAFACTORY_VERBOSITY", "INFO").upper()
    if not sys.stderr.isatty():
        # Bars of libraries are for eyes: in a file each of their steps would be a line.
        os.environ.setdefault("TQDM_DISABLE", "1")
    LOGGER.setLevel(level if level in logging.getLevelNamesMapping() else "INFO")


def is_main_process() -> bool:
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")


def info(message: str) -> None:
    if is_main_process():
        LOGGER.info(message)


def warn(message: str) -> None:
    if is_main_process():
        LOGGER.warning("warning: %s", message)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """While open, the logger `name` of a library says errors only: what it would say, luthier says."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def silence_libraries() -> None:
    """Leave the word to luthier: no bars while weights load, no notes meant for the authors of libraries.

    Downloads from a hub keep their bars on a terminal. Imports transformers.
    """
    import warnings

    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    enable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    # That the tokenizer was fitted to the chat format has been said; transformers would say it again in other words.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
