"""Fixtures that several test files share. Tests never touch the network and never use more than one thread."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def tokenizer():
    """The byte tokenizer; do not change it, build your own with `tiny.byte_tokenizer()`."""
    return tiny.byte_tokenizer()


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory) -> Path:
    """A saved tiny Llama with its tokenizer; read-only for tests."""
    return tiny.tiny_llama(tmp_path_factory.mktemp("tiny-llama"))
