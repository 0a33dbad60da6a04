"""Luthier fine-tunes large language models: a run file in, a fine-tuned model out.

From Python: ``luthier.train({...})``, ``luthier.evaluate({...})``, ``luthier.export({...})`` and
``luthier.chat({...})`` take the keys of a run file.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "chat", "evaluate", "export", "train"]

if TYPE_CHECKING:
    from luthier.api import chat, evaluate, export, train


def __getattr__(name: str) -> Any:
    """Import these functions when they are first used, so that `import luthier` is fast."""
    if name in ("chat", "evaluate", "export", "train"):
        from luthier import api

        return getattr(api, name)
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")
