"""Log messages. They go to stderr; stdout is for results.

Of a distributed run only the first process of each machine logs. `LLAMAFACTORY_VERBOSITY` sets the level, as in the
reference.
"""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from luthier.core.errors import InvalidInput

LOGGER = logging.getLogger("luthier")


class _Stderr(logging.StreamHandler):
    """Looks up `sys.stderr` for every record, so that a later redirection takes effect."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def set_up() -> None:
    """Attach the handler once; called by the CLI and by the Python API. Raises `InvalidInput`."""
    if LOGGER.handlers:
        return
    level = _level()
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.addHandler(handler)
    LOGGER.propagate = False
    # peft imports bitsandbytes if it is installed, and bitsandbytes advertises a kernel to download.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        # In a file, each step of a library's progress bar would be a line.
        os.environ.setdefault("TQDM_DISABLE", "1")
    LOGGER.setLevel(level)


def _level() -> int:
    name = os.environ.get("LLAMAFACTORY_VERBOSITY") or "INFO"
    level = logging.getLevelNamesMapping().get(name.upper())
    if level is None:
        raise InvalidInput(
            f"LLAMAFACTORY_VERBOSITY: {name!r}: there is no such level -> write DEBUG, INFO, WARNING, ERROR or CRITICAL"
        )
    return level


def is_main_process() -> bool:
    """Whether this is the first process of the run on this machine."""
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")


def info(message: str) -> None:
    if is_main_process():
        LOGGER.info(message)


def warn(message: str) -> None:
    if is_main_process():
        LOGGER.warning("warning: %s", message)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """A context in which the library logger `name` logs errors only, because luthier logs the rest itself."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def silence_libraries() -> None:
    """Silence libraries: no progress bars while weights load, no warnings meant for library authors.

    Downloads from a hub keep their bars on a terminal. Imports transformers.
    """
    import warnings

    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    enable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    # luthier has logged how it adapted the tokenizer to the chat format; transformers would log it again.
    logging.getLogger("transformers.trainer_utils").setLevel(logging.ERROR)
