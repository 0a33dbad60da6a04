"""Mixture of depths: every second block lets only a share of the tokens of each text through.

Raposo et al. 2024, https://arxiv.org/abs/2404.02258. Letters: B rows, T tokens of a row, D hidden size, K tokens that a
block computes, n tokens of one text, f what a block adds to its input.

    score    r_i = 1 + w . x_i
    output   x_i + r_i f(X)_i   for the ceil(CAPACITY n) tokens of a text with the highest scores, X being these alone
             x_i                for the others                                                              (eq. 1)

The 1 changes no ranking. With it the tokens that pass get, at first, what the dense block would have given them, so a
trained model can be converted.

To choose the best of a text looks ahead, which is not possible while an answer is written. The paper trains a second
network to foresee the choice, or a loss that pulls the scores of the chosen above a fixed number. Here, each block
keeps a running mean of the score that divided the chosen from the others while it trained, and outside training a token
passes if its own score is above that. This adds no loss, so it goes with every way to train, and sees the past only.

The chosen tokens of all texts of a batch lie behind one another in one row, (1, K, D), and attention keeps texts apart
(`luthier.model.attention`). So rows that are concatenated and rows that are padded take the same way, and the gradient
checkpoint of a block keeps K tokens. Keys and values of a block belong to its chosen tokens only: there is no cache.
"""

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.model.attention import isolate_samples, isolates_samples
from luthier.model.classes import ROUTED_KEY, is_routed
from luthier.model.modules import layer_list

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

MODEL_TYPE = "luthier_mixture_of_depths"
"""The `model_type` in the config.json of such a model. Other programs do not know it, and say so, instead of computing
every token in every block; the type that the blocks have stands in the entry `ROUTED_KEY`."""
CAPACITY = 0.125
"""Share of the tokens that a routed block computes; the best of the paper, section 4.1."""
INIT_STD = 0.02
"""Of the scores, for hidden states of size 1."""
NEWEST = 0.01
"""Least weight of the newest batch in the running mean."""
CACHE_NAMES = ("cache", "past_key_values")
"""What blocks call the keys and values of earlier tokens: since transformers 5.24, and before."""


def convert(model: "PreTrainedModel", capacity: float = CAPACITY) -> None:
    """Give every second block of `model` a router. Raises `ModelError` for a model that this cannot be done with."""
    import torch

    if is_routed(model.config):
        raise _cannot(model, "is a mixture of depths already", "set mixture_of_depths: load")
    lack = _reason_against(model)
    if lack:
        raise _cannot(model, lack, "leave mixture_of_depths out, or take a plain decoder of text (Llama, Qwen, ...)")
    dense = _probe(model)
    setattr(model.config, ROUTED_KEY, {"model_type": model.config.model_type, "capacity": capacity})
    add_routers(model)
    routers: list[Any] = [layer.depth_router for layer in layer_list(model)[1][1::2]]
    with torch.no_grad():
        for router in routers:
            router.weight.zero_()
    if not torch.allclose(_probe(model), dense, rtol=1e-3, atol=1e-3 * float(dense.abs().max())):
        raise _cannot(
            model, "computes something else when its tokens lie behind one another in one row", "leave it out"
        )
    for router in routers:
        router.start()


def add_routers(model: "PreTrainedModel") -> None:
    """Fresh routers for a model whose config says that it has them."""
    kind: Any = type(model)
    model.__class__ = routed_class(kind)
    _add_routers(model)
    prepare(model)


def prepare(model: "PreTrainedModel") -> None:
    """What a loaded mixture of depths needs to compute: attention that keeps texts apart, and no cache."""
    isolate_samples(model)
    model.config.use_cache = False
    if model.can_generate():
        model.generation_config.use_cache = False


def register() -> None:
    """Let transformers, in this process, read the config of a mixture of depths as that of its blocks."""
    from transformers import AutoConfig

    AutoConfig.register(MODEL_TYPE, _config_reader(), exist_ok=True)


@cache
def routed_class(kind: Any) -> Any:
    """The class of models like `kind`, under the same name, with routers that are built, loaded and saved with them."""

    class Routed(kind):
        _keep_in_fp32_modules_strict = frozenset({*(kind._keep_in_fp32_modules_strict or ()), "depth_router"})

        def __init__(self, config: "PreTrainedConfig", *args: Any, **kwargs: Any) -> None:
            super().__init__(config, *args, **kwargs)
            _add_routers(self)

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            super().save_pretrained(save_directory, *args, **kwargs)
            _name_type(Path(save_directory) / "config.json")

    return _named_like(Routed, kind)


def _add_routers(model: "PreTrainedModel") -> None:
    """A fresh router for the blocks 1, 3, 5, ..."""
    capacity = getattr(model.config, ROUTED_KEY)["capacity"]
    width = model.config.get_text_config().hidden_size
    for layer in layer_list(model)[1][1::2]:
        kind: Any = type(layer)
        layer.__class__ = _routed_layer(kind)
        layer.depth_router = _router_class()(width, capacity).to(next(layer.parameters()).device)


@cache
def _router_class() -> "type[Any]":
    import torch

    class DepthRouter(torch.nn.Module):
        """Scores tokens and says which of them pass."""

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

        def forward(self, hidden: "Tensor", texts: Sequence[tuple[int, int]]) -> "tuple[Tensor, Tensor]":
            """hidden: (B T, D); texts: where each begins and ends in it. Returns (B T,) scores and (K,) places."""
            scores = 1 + (hidden.float() * self.weight.float()).sum(-1)
            known = scores.detach()
            if not self.training:
                real = torch.cat([torch.arange(begin, end, device=hidden.device) for begin, end in texts])
                return scores, real[known[real] > self.threshold]
            best = [begin + _best(known[begin:end], self.capacity) for begin, end in texts]
            places = torch.cat(best)
            self.observe(torch.cat([known[begin:end] for begin, end in texts]), len(places))
            return scores, places

        @torch.no_grad()
        def observe(self, scores: "Tensor", num_chosen: int) -> None:
            """The score halfway between the `num_chosen` best of a batch and the others joins the running mean."""
            if num_chosen == len(scores):
                between = scores.min() - 1
            else:
                best = scores.topk(num_chosen + 1).values
                between = best[-2:].mean()
            self.num_seen += 1
            share = (1 / self.num_seen).clamp(min=NEWEST)
            self.threshold += share * (between - self.threshold)

    return DepthRouter


def _best(scores: "Tensor", capacity: float) -> "Tensor":
    """The places of the highest scores of one text, in order."""
    places: Tensor = scores.topk(math.ceil(capacity * len(scores))).indices.sort().values
    return places


@cache
def _routed_layer(kind: Any) -> Any:
    """The class of blocks like `kind`, under the same name, that compute the tokens that their router chooses.

    It overrides `__call__`, so that the router stands outside of the gradient checkpoint, which is in `forward`.
    """
    names = list(inspect.signature(kind.forward).parameters)[1:]

    class RoutedLayer(kind):
        def __call__(self, hidden_states: "Tensor", *args: Any, **kwargs: Any) -> Any:

            given = {**dict(zip(names[1:], args, strict=False)), **kwargs}
            *rows, width = hidden_states.shape
            for name in CACHE_NAMES:
                _require_no_cache(given.get(name), rows[1])
            texts = _texts(rows[0], rows[1], given.get("attention_mask"), given.get("cu_seq_lens_q"))
            flat = hidden_states.reshape(-1, width)
            scores, places = self.depth_router(flat, texts)
            if not len(places):
                return hidden_states
            chosen = flat[places]
            counts = [int(((places >= begin) & (places < end)).sum()) for begin, end in texts]
            out = super().__call__(chosen[None], **_for_chosen(given, rows, places, [n for n in counts if n]))
            computed = (out[0] if isinstance(out, tuple) else out)[0]
            added = scores[places, None] * (computed - chosen)
            result = flat.index_put((places,), chosen + added.to(flat.dtype)).view(*rows, width)
            return (result, *out[1:]) if isinstance(out, tuple) else result

    return _named_like(RoutedLayer, kind)


def _named_like(new: "type[Any]", kind: "type[Any]") -> "type[Any]":
    """Files and libraries know models and blocks by the names of their classes."""
    new.__name__, new.__qualname__, new.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return new


def _texts(num_rows: int, num_tokens: int, mask: "Tensor | None", bounds: "Tensor | None") -> list[tuple[int, int]]:
    """Where each text begins and ends, counted over all rows.

    `mask`: (B, T) or (B, 1, T, T), true or 0.0 where a token is seen. `bounds`: of the texts of a single row.
    """
    import torch

    if bounds is not None:
        return list(pairwise(bounds.tolist()))
    if mask is None:
        return [(row * num_tokens, (row + 1) * num_tokens) for row in range(num_rows)]
    seen = mask[:, 0, -1] if mask.ndim == 4 else mask
    real = seen == 0 if seen.is_floating_point() else seen.bool()
    found = []
    for row, tokens in enumerate(real.expand(num_rows, -1)):
        where = torch.nonzero(tokens)
        if len(where):
            found.append((row * num_tokens + int(where[0]), row * num_tokens + int(where[-1]) + 1))
    return found


def _for_chosen(
    given: Mapping[str, Any], rows: Sequence[int], places: "Tensor", counts: Sequence[int]
) -> dict[str, Any]:
    """What a block is called with, for the tokens at `places` only, which lie behind one another; `counts` per text."""
    import torch

    def pick(value: Any) -> Any:
        """Of what is given for each token, (B or 1, T, ...), that of the chosen ones."""
        if isinstance(value, (tuple, list)):
            return type(value)(pick(each) for each in value)
        if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.shape[1] != rows[1]:
            return value
        return value[0, places % rows[1]][None] if value.shape[0] == 1 else value.flatten(0, 1)[places][None]

    absent = ("attention_mask", *CACHE_NAMES, "cache_position")
    chosen = {name: None if name in absent else pick(value) for name, value in given.items()}
    if "use_cache" in chosen:
        chosen["use_cache"] = False
    bounds = torch.tensor([0, *counts], device=places.device).cumsum(0).to(torch.int32)
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


def _reason_against(model: "PreTrainedModel") -> str:
    """What keeps a model from being converted, or the empty text."""
    config = model.config
    if config.is_encoder_decoder or config.sub_configs:
        return "is not a plain decoder of text"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in layer_types or (not layer_types and getattr(config, "sliding_window", None)):
        return "has sliding windows, which would count the tokens that pass and not those of the text"
    reason = isolates_samples(model)
    if reason is not None:
        return f"cannot keep texts apart that lie behind one another: {reason}"
    layers = layer_list(model)[1]
    names = list(inspect.signature(type(layers[0]).forward).parameters)
    return "" if len(layers) > 1 and names[1] == "hidden_states" else "has no second block of the usual form"


def _probe(model: "PreTrainedModel") -> "Tensor":
    """(12, V) logits of two texts of 7 and 5 tokens in padded rows."""
    import torch

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2, 7), generator=generator).to(model.device)
    real = torch.tensor([[1] * 7, [1] * 5 + [0] * 2], device=model.device)
    was_training = model.training
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=ids, attention_mask=real, use_cache=False).logits[real.bool()]
    model.train(was_training)
    return logits.float()


def _cannot(model: "PreTrainedModel", reason: str, remedy: str) -> ModelError:
    return ModelError(f"mixture_of_depths: {type(model).__name__} {reason} -> {remedy}")


@cache
def _config_reader() -> "type[PreTrainedConfig]":
    from transformers import PreTrainedConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    class DepthsConfig(PreTrainedConfig):
        model_type = MODEL_TYPE

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            kind = config_dict[ROUTED_KEY]["model_type"]
            return CONFIG_MAPPING[kind].from_dict({**config_dict, "model_type": kind}, **kwargs)

    return DepthsConfig


def _name_type(file: Path) -> None:
    if file.is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
        file.write_text(json.dumps({**config, "model_type": MODEL_TYPE}, indent=2) + "\n", encoding="utf-8")
