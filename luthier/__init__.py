"""Luthier fine-tunes large language models: a run file in, a fine-tuned model out.

From Python: ``luthier.train({...})``, ``luthier.export({...})`` and ``luthier.chat({...})`` take a run file's keys.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "chat", "export", "train"]

if TYPE_CHECKING:
    from luthier.api import chat, export, train


def __getattr__(name: str) -> Any:
    """Import the three functions when they are first used, so that `import luthier` is fast."""
    if name in ("chat", "export", "train"):
        from luthier import api

        return getattr(api, name)
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")
