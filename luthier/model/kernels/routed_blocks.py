"""Blocks and models of a mixture of depths: the classes behind `luthier.model.features.mixture_of_depths`.

Letters: B rows, T tokens of a row, D hidden size, K tokens that a block computes, n tokens of one text.
"""

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from luthier.core.errors import ModelError
from luthier.model.classes import CACHE_NAMES, ROUTED_KEY, ROUTED_MODEL_TYPE
from luthier.model.kernels.samples import bounds_of, numbers_of, once
from luthier.model.modules import layer_list

INIT_STD = 0.02
"""Of the scores, for hidden states of size 1."""
NEWEST = 0.01
"""Least weight of the newest batch in the running mean."""


class DepthRouter(torch.nn.Module):
    """Scores tokens, and chooses those that the block computes."""

    def __init__(self, width: int, capacity: float) -> None:
        super().__init__()
        self.capacity = capacity
        self.weight = torch.nn.Parameter(torch.empty(width, dtype=torch.float32))
        self.threshold: torch.Tensor
        self.num_seen: torch.Tensor
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float32))
        self.register_buffer("num_seen", torch.zeros((), dtype=torch.int64))
        self.start()

    def start(self) -> None:
        """Small random scores around 1, above the threshold 0: until it is trained, every token passes."""
        torch.nn.init.normal_(self.weight, std=INIT_STD / math.sqrt(self.weight.numel()))

    def forward(self, hidden: Tensor, texts: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor, list[int]]:
        """hidden: (B T, D); texts: where each begins and ends in it. Returns (B T,) scores, (K,) places and how many of
        these are in each text."""
        scores = 1 + (hidden.float() * self.weight.float()).sum(-1)
        known = scores.detach()
        if not self.training:
            real = torch.cat([torch.arange(begin, end, device=hidden.device) for begin, end in texts])
            places = real[known[real] > self.threshold]
            return scores, places, [int(((places >= begin) & (places < end)).sum()) for begin, end in texts]
        best = [begin + _best(known[begin:end], self.capacity) for begin, end in texts]
        places = torch.cat(best)
        self.observe(torch.cat([known[begin:end] for begin, end in texts]), len(places))
        return scores, places, [len(places) for places in best]

    @torch.no_grad()
    def observe(self, scores: Tensor, num_chosen: int) -> None:
        """The score halfway between the `num_chosen` best of a batch and the others joins the running mean."""
        if num_chosen == len(scores):
            between = scores.min() - 1
        else:
            best = scores.topk(num_chosen + 1).values
            between = best[-2:].mean()
        self.num_seen += 1
        share = (1 / self.num_seen).clamp(min=NEWEST)
        self.threshold += share * (between - self.threshold)


def _best(scores: Tensor, capacity: float) -> Tensor:
    """The places of the highest scores of one text, in order."""
    places: Tensor = scores.topk(math.ceil(capacity * len(scores))).indices.sort().values
    return places


@cache
def routed_class(kind: Any) -> Any:
    """The class of models like `kind`, under the same name, with routers that are built, loaded and saved with them."""

    class Routed(kind):
        _keep_in_fp32_modules_strict = frozenset({*(kind._keep_in_fp32_modules_strict or ()), "depth_router"})

        def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            put_routers(self)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            super().save_pretrained(save_directory, *args, **kwargs)
            name_type(Path(save_directory) / "config.json")

    return _named_like(Routed, kind)


def put_routers(model: PreTrainedModel) -> None:
    """A fresh router for the blocks 1, 3, 5, ..."""
    capacity = getattr(model.config, ROUTED_KEY)["capacity"]
    width = model.config.get_text_config().hidden_size
    for layer in layer_list(model)[1][1::2]:
        kind: Any = type(layer)
        layer.__class__ = _routed_layer(kind)
        layer.depth_router = DepthRouter(width, capacity).to(next(layer.parameters()).device)


@cache
def _routed_layer(kind: Any) -> Any:
    """The class of blocks like `kind`, under the same name, that compute the tokens that their router chooses.

    It overrides `__call__`, so that the router stands outside of the gradient checkpoint, which is in `forward`.
    """
    names = list(inspect.signature(kind.forward).parameters)[1:]

    class RoutedLayer(kind):
        def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:

            given = {**dict(zip(names[1:], args, strict=False)), **kwargs}
            *rows, width = hidden_states.shape
            for name in CACHE_NAMES:
                _require_no_cache(given.get(name), rows[1])
            texts = _texts(rows[0], rows[1], given.get("attention_mask"), given.get("cu_seq_lens_q"))
            flat = hidden_states.reshape(-1, width)
            scores, places, counts = self.depth_router(flat, texts)
            if not len(places):
                return hidden_states
            chosen = flat[places]
            out = super().__call__(chosen[None], **_for_chosen(given, rows, places, [n for n in counts if n]))
            computed = (out[0] if isinstance(out, tuple) else out)[0]
            added = scores[places, None] * (computed - chosen)
            result = flat.index_put((places,), chosen + added.to(flat.dtype)).view(*rows, width)
            return (result, *out[1:]) if isinstance(out, tuple) else result

    return _named_like(RoutedLayer, kind)


def _named_like(new: type[Any], kind: type[Any]) -> type[Any]:
    """Files and libraries know models and blocks by the names of their classes."""
    new.__name__, new.__qualname__, new.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return new


def _texts(num_rows: int, num_tokens: int, mask: Tensor | None, bounds: Tensor | None) -> list[tuple[int, int]]:
    """Where each text begins and ends, counted over all rows.

    `mask`: (B, T) or (B, 1, T, T), true or 0.0 where a token is seen. `bounds`: of the texts of a single row.
    """
    if bounds is not None:
        return list(pairwise(numbers_of(bounds)))
    if mask is None:
        return [(row * num_tokens, (row + 1) * num_tokens) for row in range(num_rows)]
    rows: list[list[bool]] = once(mask, "real", lambda: _real(mask).tolist())
    found = []
    for row, is_real in enumerate(rows * num_rows if len(rows) == 1 else rows):
        where = [row * num_tokens + place for place, one in enumerate(is_real) if one]
        if where:
            found.append((where[0], where[-1] + 1))
    return found


def _real(mask: Tensor) -> Tensor:
    """(B or 1, T) whether a token is none of padding."""
    seen = mask[:, 0, -1] if mask.ndim == 4 else mask
    return seen == 0 if seen.is_floating_point() else seen.bool()


def _for_chosen(given: Mapping[str, Any], rows: Sequence[int], places: Tensor, counts: Sequence[int]) -> dict[str, Any]:
    """The arguments of a block for the tokens at `places` only, concatenated without padding; `counts` per text."""

    def pick(value: Any) -> Any:
        """The rows of the chosen tokens in a tensor of shape (B or 1, T, ...)."""
        if isinstance(value, (tuple, list)):
            return type(value)(pick(each) for each in value)
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.shape[1] != rows[1]:
            return value
        return value[0, places % rows[1]][None] if value.shape[0] == 1 else value.flatten(0, 1)[places][None]

    absent = ("attention_mask", *CACHE_NAMES, "cache_position")
    chosen = {name: None if name in absent else pick(value) for name, value in given.items()}
    if "use_cache" in chosen:
        chosen["use_cache"] = False
    given_bounds = given.get("cu_seq_lens_q")
    device = places.device if given_bounds is None else given_bounds.device  # of a plan, only bounds have numbers
    bounds = bounds_of(counts, device)
    return chosen | {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(counts),
        "max_length_k": max(counts),
    }


def _require_no_cache(cache: Any, num_tokens: int) -> None:
    if cache is not None and cache.get_seq_length() > num_tokens:
        raise ModelError(
            "a mixture of depths keeps no keys and values of earlier tokens -> generate with use_cache=False"
        )


def name_type(file: Path) -> None:
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**config, "model_type": ROUTED_MODEL_TYPE}, indent=2) + "\n", encoding="utf-8")
