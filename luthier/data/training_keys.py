"""Which keys of a message say something about training, by their words. Each tool has its own."""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

_CORE = {
    "train",
    "trainable",
    "trained",
    "training",
    "loss",
    "losses",
    "learn",
    "learned",
    "learnable",
    "mask",
    "masked",
}
_CORE |= {"masking", "unmask", "unmasked", "weight", "weights"}
_BESIDE = {"is", "no", "not", "do", "on", "in", "for", "from", "this", "skip", "ignore", "exclude", "include", "use"}
_BESIDE |= {"compute", "calculate", "should", "only", "step", "token", "tokens", "label", "labels", "scale", "detail"}
_BESIDE |= {"details", "ratio", "factor", "enabled", "flag", "span", "spans", "turn", "message"}


def training_keys(message: Mapping[str, Any]) -> Iterator[str]:
    """The keys of a message that say what is learned, understood or not."""
    return (key for key, value in message.items() if value is not None and is_about_training(key))


@lru_cache(maxsize=1024)
def is_about_training(key: str) -> bool:
    """Whether every word of a key is one of training: `ignore_loss` is, `weight_kg` and `training_data` are not."""
    words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[^\W_]+", key)}
    return bool(words & _CORE) and words <= _CORE | _BESIDE
