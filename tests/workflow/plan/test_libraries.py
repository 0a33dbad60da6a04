"""What libraries add to the memory is measured once, and remembered as long as nothing is installed."""

import json
import sys

import pytest

from luthier.config.load import load_train
from luthier.workflow.plan import libraries
from luthier.workflow.plan.libraries import missing_bytes
from tests.small_world import WAYS, small_world

ADDED = 50 * 10**6
LIBRARY = "held = bytearray(int({added}))\nheld[::4096] = b'1' * len(held[::4096])\n"


@pytest.fixture
def run(tmp_path):
    return load_train({**small_world(tmp_path / "world"), **WAYS["lora"]})


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library that holds 50 MB, in a folder of packages, as the only one that training needs."""
    packages = tmp_path / "site-packages"
    (packages / "__pycache__").mkdir(parents=True)  # a new entry would be a change
    (packages / "large_library.py").write_text(LIBRARY.format(added=ADDED))
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(libraries, "OF_TRAINING", ("large_library",))
    yield packages
    sys.modules.pop("large_library", None)


def files(tmp_path):
    return sorted((tmp_path / "cache" / "libraries").glob("*.json"))


def test_the_first_plan_measures_and_later_ones_remember(run, library, tmp_path):
    found = missing_bytes(run, "cpu")
    assert found == pytest.approx(ADDED, rel=0.2)
    assert missing_bytes(run, "cpu") == 0  # now this process has it
    del sys.modules["large_library"]
    assert missing_bytes(run, "cpu") == found and "large_library" not in sys.modules
    (file,) = files(tmp_path)
    file.write_text(json.dumps({"bytes": 7}))
    assert missing_bytes(run, "cpu") == 7


@pytest.mark.parametrize("damage", ["", "[]", '{"bytes": null}'])
def test_a_damaged_file_is_measured_again(run, library, tmp_path, damage):
    missing_bytes(run, "cpu")
    (file,) = files(tmp_path)
    whole = json.loads(file.read_text())
    file.write_text(damage)
    del sys.modules["large_library"]
    assert missing_bytes(run, "cpu") == pytest.approx(ADDED, rel=0.2)
    assert json.loads(file.read_text())["state"] == whole["state"]


def test_a_new_package_is_measured_with_the_others(run, library, tmp_path):
    missing_bytes(run, "cpu")
    del sys.modules["large_library"]
    (library / "another.py").write_text("")
    missing_bytes(run, "cpu")
    assert len(files(tmp_path)) == 2


def test_libraries_are_not_in_the_memory_of_an_accelerator(run, library, tmp_path):
    assert missing_bytes(run, "cuda") == 0 and "large_library" not in sys.modules and not files(tmp_path)
