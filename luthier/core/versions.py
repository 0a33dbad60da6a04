"""Optional libraries: imported when used; a missing one is an error with the pip command."""

import importlib
import importlib.util
from functools import lru_cache
from types import ModuleType

from luthier.core.errors import MissingExtra


def is_installed(module: str) -> bool:
    """Whether `module` can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def missing_extra(module: str, extra: str, purpose: str) -> MissingExtra:
    return MissingExtra(
        f"{purpose} needs the library `{module}`, which is not installed: pip install 'luthier[{extra}]'"
    )


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional library. `extra` is its name in pyproject.toml; `purpose` starts the error sentence.

    Raises `MissingExtra` if it is not installed.
    """
    if not is_installed(module.partition(".")[0]):
        raise missing_extra(module, extra, purpose)
    return importlib.import_module(module)


@lru_cache
def library_version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    import importlib.metadata  # slow to import, and `luthier check` does not need it

    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
