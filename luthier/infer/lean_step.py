"""One decoding step of a model of the Llama kind, without the work that its modules do around the products.

At each step transformers makes masks, looks up attention functions, repeats the keys of grouped queries and calls about
400 modules: for SmolLM2-135M on a CPU, 20 of 60 ms. Here the same numbers come from the same weights in a plain loop:

    q, k, v = norm(x) W_q, norm(x) W_k, norm(x) W_v
    x = x + softmax(rope(q) rope(K)^T / sqrt(d)) V W_o          K, V: of all tokens so far
    x = x + (act(norm(x) W_gate) * norm(x) W_up) W_down

Whether a model computes this is not looked up by its name. Its modules must have the usual names, and a small random
model of the same class and config must give the same logits. Every other model takes its own code.
B rows, T columns, D width, H heads, K of them with keys, G = H / K, d width of a head, V vocabulary.
"""

import copy
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from luthier.core.log import info
from luthier.infer.cache import new_cache
from luthier.infer.products import together
from luthier.model.attention import PER_SAMPLE
from luthier.model.kernels import fuse
from luthier.model.kernels.lora_layers import has_hooks
from luthier.model.modules import cache_name, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import DynamicCache

PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
ATTENTION = {"sdpa", "eager", PER_SAMPLE}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "pad_token_id": None,
}
"""The config of the model that is tried. It has as many layers as the real one: some may differ."""


class _Other(Exception):
    """A model computes something else. Its text says what."""


TOLERANCE = 1e-3
"""Of the largest logit, in float32."""
FAULTS = (*fuse.FAULTS, _Other)

_tried: dict[tuple[type, str], bool] = {}
_reasons: set[str] = set()


class LeanStep:
    """Computes the logits of one more token for each row."""

    def __init__(self, model: Any, trials: fuse.Trials) -> None:
        """Raises `_Other` if the modules are not those of the formula."""
        base: Any = model.model
        self.embed, self.rotary, self.head = base.embed_tokens, base.rotary_emb, together([model.lm_head])
        self.norm = _Norm(base.norm, trials)
        self.layers = [_Layer(layer, trials) for layer in base.layers]

    def __call__(self, ids: Tensor, lengths: Sequence[int], cache: "DynamicCache", offset: int = 0) -> Tensor:
        """(B, 1) ids -> (B, V) logits. `lengths`: the tokens of each row, these included; before them is padding.
        `offset`: the position of the first token."""
        num_columns, mask = max(lengths), None
        ends = torch.tensor(lengths, device=ids.device)[:, None]
        if min(lengths) < num_columns:
            mask = (torch.arange(num_columns, device=ids.device) >= num_columns - ends)[:, None, None]
        x = self.embed(ids)
        cos, sin = self.rotary(x, ends - 1 + offset)
        half = sin.shape[-1] // 2
        sin = torch.cat([-sin[..., :half], sin[..., half:]], -1)
        layers: list[Any] = cache.layers
        for layer, stored in zip(self.layers, layers, strict=True):
            x = layer(x, cos, sin, mask, stored)
        logits: Tensor = self.head(self.norm(x))[:, -1]
        return logits


class _Layer:
    def __init__(self, layer: Any, trials: fuse.Trials) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = _Norm(layer.input_layernorm, trials), _Norm(layer.post_attention_layernorm, trials)
        self.qkv = together([attention.q_proj, attention.k_proj, attention.v_proj])
        self.o = together([attention.o_proj])
        names = ("q_norm", "k_norm") if "q_norm" in attention._modules else ()
        self.head_norms = tuple(_Norm(attention._modules[name], trials) for name in names)
        self.width, self.scaling = (_required(vars(attention).get(name), attention) for name in ("head_dim", "scaling"))
        self.num_heads = attention.o_proj.in_features // self.width
        self.activation = _required(fuse.activation_in_use(mlp, trials), mlp)
        self.gate_up, self.down = together([mlp.gate_proj, mlp.up_proj]), together([mlp.down_proj])

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, stored: Any) -> Tensor:
        """x (B, 1, D), cos and sin (B, 1, d) with the sign of the rotation in sin -> (B, 1, D)"""
        num_rows, width, num_heads = len(x), self.width, self.num_heads
        heads = self.qkv(self.norms[0](x)).view(num_rows, -1, width)
        num_keys = (heads.shape[1] - num_heads) // 2
        both, v = heads[:, :-num_keys], heads[:, -num_keys:]
        if self.head_norms:
            both = torch.cat([self.head_norms[0](both[:, :num_heads]), self.head_norms[1](both[:, num_heads:])], 1)
        both = both * cos + both.roll(width // 2, -1) * sin
        keys, values = stored.update(both[:, num_heads:, None], v[:, :, None])
        q = both[:, :num_heads].view(num_rows, num_keys, -1, width)  # queries with the same keys, as if one sequence
        out = scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self.scaling)
        x = x + self.o(out.reshape(num_rows, 1, -1))
        gate, up = self.gate_up(self.norms[1](x)).chunk(2, -1)
        return x + self.down(self.activation.apply(gate) * up)


class _Norm:
    """RMSNorm as in `luthier.model.kernels.rms_norm`, without what its gradient needs."""

    def __init__(self, module: Any, trials: fuse.Trials) -> None:
        form, weight = _required(fuse.form_in_use(module, trials), module), module.weight.detach()
        self.eps = fuse.eps_of(module)
        self.summand = torch.tensor(self.eps)
        self.inner = (weight.float() + 1 if form.adds_one else weight.float()) if form.rounds_last else None
        """What the numbers are multiplied by before they are rounded to the format of x."""
        self.outer = None if form.rounds_last else weight
        """And afterwards."""

    def __call__(self, x: Tensor) -> Tensor:
        y = self._normalized(x.float()).to(x.dtype)
        return y if self.outer is None else y * self.outer

    def _normalized(self, x: Tensor) -> Tensor:
        if not x.is_cpu:
            return rms_norm(x, x.shape[-1:], self.inner, self.eps)
        # On a CPU `rms_norm` is ten operations, each of which takes as long as this whole row.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        y = x * torch.addcmul(self.summand, norm, norm, value=1 / x.shape[-1]).rsqrt_()
        return y if self.inner is None else y * self.inner


def lean_step(model: "PreTrainedModel") -> LeanStep | None:
    """The step of this model; None, after saying why, if the model takes its own code."""
    try:
        return _found(model)
    except _Other as reason:
        told = f"answers: {reason}, so each token takes the model's own code"
        if told not in _reasons:
            _reasons.add(told)
            info(told)
        return None


def _found(model: Any) -> LeanStep:
    base: Any = unwrap(model)
    if model is not base and (model.active_peft_config.is_prompt_learning or _is_changed(model)):
        raise _Other("the adapter changes more than layers")
    _require_usual(base)
    if base.config._attn_implementation not in ATTENTION:
        raise _Other(f"its attention is {base.config._attn_implementation}")
    step = LeanStep(base, {})
    key = type(base), base.config.to_json_string()
    if key not in _tried:
        _tried[key] = _differs(base)
    if _tried[key]:
        raise _Other(f"{type(base).__name__} computes more than a Llama")
    return step


def _require_usual(base: Any) -> None:
    """Raises `_Other` unless the modules have the usual names, and nothing but their classes says what they compute."""
    _require_children(base, {"model", "lm_head"})
    _require_children(base.model, {"embed_tokens", "layers", "norm", "rotary_emb"})
    for layer in base.model.layers:
        _require_children(layer, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"})
        _require_children(layer.self_attn, PROJECTIONS, {"q_norm", "k_norm"})
        if has_hooks(layer.mlp):
            raise _Other(f"{type(layer.mlp).__name__} has hooks")


def _require_children(module: Any, names: set[str], more: Set[str] = frozenset()) -> None:
    found = set(module._modules)
    if not names <= found <= names | more or len(found & more) == 1:
        raise _Other(f"{type(module).__name__} has other modules than a Llama")
    if _is_changed(module):
        raise _Other(f"{type(module).__name__} has hooks or code of its own")


def _is_changed(module: nn.Module) -> bool:
    return ("forward" in vars(module) and not fuse.attends_as_before(module)) or has_hooks(module)


def _required(found: Any, module: nn.Module) -> Any:
    if found is None:
        raise _Other(f"{type(module).__name__} computes something else than in a Llama")
    return found


def _differs(base: Any) -> bool:
    """Whether a small random model of this class and config gives other logits than the formula.

    Rows of different lengths, at the first positions and at the last ones.
    """
    config = copy.deepcopy(base.config)
    for name, value in SMALL.items():
        if name in config.to_dict():
            setattr(config, name, value)
    config._attn_implementation = "sdpa"
    limit = config.to_dict().get("max_position_embeddings") or 4096
    try:
        with torch.random.fork_rng(devices=()), torch.device("cpu"), torch.no_grad():
            torch.manual_seed(0)
            small = type(base)(config).float().eval()
            for weight in small.parameters():
                weight.copy_(torch.randn(weight.shape) * 0.2 + (weight.ndim == 1))
            return any(_differs_at(small, offset) for offset in (0, max(limit - 16, 0)))
    except FAULTS:
        return True


def _differs_at(small: Any, offset: int) -> bool:
    """`offset`: the position of the first token."""
    lengths, num_columns = [5, 9, 3], 9
    ends = torch.tensor(lengths)[:, None]
    ids = torch.arange(3 * num_columns).view(3, -1) * 7 % small.config.vocab_size
    places = torch.arange(num_columns)
    mask, positions = (places >= num_columns - ends).long(), (places - num_columns + ends).clamp(min=0) + offset
    name = cache_name(small)
    assert name is not None, "a model whose answers share a batch has one"
    caches = [new_cache(small.config) for _ in range(2)]
    for cache in caches:
        before = {"attention_mask": mask[:, :-1], "position_ids": positions[:, :-1], name: cache}
        small(input_ids=ids[:, :-1], **before, use_cache=True)
    now = {"attention_mask": mask, "position_ids": positions[:, -1:], name: caches[0]}
    expected = small(input_ids=ids[:, -1:], **now, use_cache=True).logits[:, -1]
    found = LeanStep(small, {})(ids[:, -1:], lengths, caches[1], offset)
    return bool((found - expected).abs().max() > TOLERANCE * expected.abs().max())
