"""How modules of other libraries are imported: under a context of ours, or only when they are used.

`import_within` is for a library whose import does work that few runs need. `import_when_used` is for commands that
can end without a library which others import at their top. Both change when code runs, not what it does.
"""

import atexit
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

Around = Callable[[ModuleType], AbstractContextManager[None]]
"""Takes the empty module; the module is executed inside the context."""


def import_within(contexts: Mapping[str, Around]) -> None:
    """From now on, the modules named here are executed inside their contexts. Those already imported stay."""
    known = [finder for finder in sys.meta_path if isinstance(finder, _Finder)]
    if known:
        known[0].contexts.update(contexts)
    else:
        sys.meta_path.insert(0, _Finder(dict(contexts)))


class _Finder(MetaPathFinder):
    def __init__(self, contexts: dict[str, Around]) -> None:
        self.contexts = contexts

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.contexts:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Within(spec.loader, self.contexts[fullname])
        return spec


class _Within(Loader):
    """Executes a module inside a context, then gives it back its own loader."""

    def __init__(self, loader: Loader, around: Around) -> None:
        self.loader, self.around = loader, around

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None, "the import system sets it"
        module.__spec__.loader = module.__loader__ = self.loader
        with self.around(module):
            self.loader.exec_module(module)


class _LaterModule(ModuleType):
    """A module that is executed at the first look at one of its attributes. It is then an ordinary module.

    `importlib.util.LazyLoader` of Python 3.11 executes a module at its second import already.
    """

    def __getattr__(self, name: str) -> Any:
        spec = self.__spec__
        assert spec is not None and spec.loader is not None, "find_spec gave both"
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__file__ = spec.origin
        if spec.submodule_search_locations is not None:
            self.__path__ = spec.submodule_search_locations
        with ExitStack() as at_failure:  # as the import system does
            at_failure.callback(sys.modules.pop, spec.name, None)
            spec.loader.exec_module(self)
            at_failure.pop_all()
        return getattr(self, name)


def import_when_used(name: str) -> None:
    """Let `import name` cost nothing until an attribute of the module is used. Does nothing if it is imported."""
    spec = find_spec(name) if name not in sys.modules else None
    if spec is None or spec.loader is None:
        return
    module = _LaterModule(name)
    module.__spec__, module.__loader__, module.__package__ = spec, spec.loader, spec.parent
    sys.modules[name] = module


def is_loaded(name: str) -> bool:
    """Whether a module has been executed."""
    return name in sys.modules and not isinstance(sys.modules[name], _LaterModule)


@contextmanager
def without_collection() -> Iterator[None]:
    """No search for garbage in cycles while modules are imported, which make many objects that all stay.

    They are not searched later either, so that collections during a run are short. What is garbage already is
    collected before, such as the model of an earlier run, since it would stay as well.
    """
    was_enabled, before = gc.isenabled(), len(sys.modules)
    if was_enabled:
        gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
            if len(sys.modules) > before:
                gc.freeze()
            # At its end the interpreter collects cycles while modules are still there for their finalizers.
            atexit.unregister(gc.unfreeze)
            atexit.register(gc.unfreeze)
