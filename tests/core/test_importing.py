"""Modules that are executed inside a context, and modules that are executed when they are used."""

import gc
import importlib
import sys
from contextlib import contextmanager
from weakref import ref

import pytest

from luthier.core.importing import import_when_used, import_within, is_loaded, without_collection

SOURCE = """\
import sys
setting = sys.modules["luthier_setting"].value
sys.modules["luthier_setting"].executed.append(__name__)
class Thing: pass
def __getattr__(name):
    if name == "computed":
        return 42
    raise AttributeError(name)
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `luthier_lib` with a module `part`, and what its modules read and write when they are executed."""
    folder = tmp_path / "luthier_lib"
    folder.mkdir()
    for name in ("__init__", "part"):
        (folder / f"{name}.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    setting = type(sys)("luthier_setting")
    setting.value, setting.executed = "outside", []
    monkeypatch.setitem(sys.modules, "luthier_setting", setting)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield setting
    for name in [name for name in sys.modules if name.startswith("luthier_lib")]:
        del sys.modules[name]


def test_only_the_named_module_is_executed_in_its_context(package):
    @contextmanager
    def inside(module):
        package.value = f"inside {module.__name__}"
        yield
        package.value, module.added = "outside", True

    import_within({"luthier_lib.part": inside})
    part = importlib.import_module("luthier_lib.part")
    assert part.setting == "inside luthier_lib.part" and part.added
    assert sys.modules["luthier_lib"].setting == "outside"
    loader = type(sys.modules["luthier_lib"].__loader__)
    assert type(part.__loader__) is type(part.__spec__.loader) is loader, "the module has its own loader again"


def test_a_module_is_executed_when_an_attribute_is_used(package):
    import_when_used("luthier_lib")
    import luthier_lib
    import luthier_lib as again  # the second import must not execute it either

    assert again is luthier_lib and package.executed == [] and not is_loaded("luthier_lib")
    assert luthier_lib.setting == "outside"
    assert package.executed == ["luthier_lib"] and is_loaded("luthier_lib")
    assert type(luthier_lib) is type(sys) and luthier_lib.computed == 42 and luthier_lib.__path__
    with pytest.raises(AttributeError):
        luthier_lib.missing  # noqa: B018


@pytest.mark.parametrize("statement", ["import luthier_lib.part", "from luthier_lib import Thing"])
def test_a_module_is_executed_for_its_parts_and_names(package, statement):
    import_when_used("luthier_lib")
    exec(statement)
    assert package.executed[0] == "luthier_lib"


def test_what_is_imported_or_absent_stays_as_it_is(package):
    luthier_lib = importlib.import_module("luthier_lib")
    import_when_used("luthier_lib")
    import_when_used("luthier_no_such_library")
    assert sys.modules["luthier_lib"] is luthier_lib and is_loaded("luthier_lib")
    assert "luthier_no_such_library" not in sys.modules


def test_a_module_that_fails_is_imported_again_next_time(package):
    del package.value
    import_when_used("luthier_lib")
    luthier_lib = sys.modules["luthier_lib"]
    with pytest.raises(AttributeError, match="value"):
        luthier_lib.Thing  # noqa: B018
    assert "luthier_lib" not in sys.modules


def test_garbage_is_collected_again_afterwards():
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), without_collection():
        assert not gc.isenabled()
        with without_collection():
            pass
        assert not gc.isenabled(), "the outer one decides"
        1 / 0  # noqa: B018
    assert gc.isenabled()
    gc.unfreeze()


class Cycle:
    """As a trainer, which only a search for garbage finds."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_of_before_goes_and_what_becomes_garbage_is_found(package):
    earlier = ref(Cycle())
    with without_collection():
        importlib.import_module("luthier_lib.part")
    assert earlier() is None
    alive = Cycle()
    later = ref(alive)
    with without_collection():
        pass  # everything is imported
    del alive
    gc.collect()
    assert later() is None
    gc.unfreeze()
