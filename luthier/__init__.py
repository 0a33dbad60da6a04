"""Luthier fine-tunes large language models: a run file in, a fine-tuned model out.

From Python: ``luthier.train({...})``, ``luthier.export({...})`` and ``luthier.chat({...})`` take what a run file holds.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "chat", "export", "train"]

if TYPE_CHECKING:
    from luthier.api import chat, export, train


def __getattr__(name: str) -> Any:
    """`import luthier` must cost nothing, so the three functions are imported when first used."""
    if name in ("chat", "export", "train"):
        from luthier import api

        return getattr(api, name)
    raise AttributeError(f"module 'luthier' has no attribute {name!r}")
