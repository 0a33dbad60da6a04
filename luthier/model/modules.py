"""Modules by name: users write `q_proj`, the model has `model.layers.0.self_attn.q_proj`."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from luthier.core.errors import ModelError
from luthier.core.registry import did_you_mean

if TYPE_CHECKING:
    from torch import nn


def require_modules(
    model: "nn.Module", wanted: Sequence[str], key: str, *, also: Sequence[str] = ()
) -> tuple[str, ...]:
    """`wanted` as it is, if each is the end of some module's name. Raises `ModelError` with the names there are.

    `also`: names of weights that could have been given as well.
    """
    names = [name for name, _ in model.named_modules() if name]
    last = {name.rpartition(".")[2] for name in names}
    for word in wanted:
        if word not in last and not any(name == word or name.endswith(f".{word}") for name in names):
            with_weights = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
            raise unknown_module(word, (*(name.rpartition(".")[2] for name in with_weights), *also), key)
    return tuple(wanted)


def unknown_module(word: str, names: Iterable[str], key: str) -> ModelError:
    known = sorted({name for name in names if name and not name.isdecimal()})
    hint = did_you_mean(word, known, repr)
    hint = f"; {hint}" if hint else ""
    return ModelError(f"{key}: no module of this model is called {word!r}{hint} (it has {', '.join(known)})")
