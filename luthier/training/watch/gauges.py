"""Hardware metrics that are logged with the loss: model FLOPs utilization and peak memory.

Model FLOPs utilization as in appendix B of PaLM (https://arxiv.org/abs/2204.02311). For a model of N weights (without
the input embedding, a lookup), L layers with H heads of size Q, a token in a sequence of T tokens takes

    6 N + 12 L H Q T

floating point operations: 2 N forward, 2 N for the gradients of activations, 2 N for those of weights. A frozen weight
therefore counts 4 instead of 6. Recomputation to save memory is not counted.
"""

import os
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from luthier.config.sections import is_on
from luthier.model.lengths import sequence_lengths
from luthier.model.modules import unwrap

if TYPE_CHECKING:
    from torch import nn

Gauge = Callable[[], Mapping[str, float]]
"""Called at each log: name -> value."""


@cache
def _peaks() -> tuple[tuple[tuple[str, ...], float], ...]:
    table = tomllib.loads(Path(__file__).with_name("peak_flops.toml").read_text(encoding="utf-8"))
    return tuple((tuple(row["words"]), row["tflops"] * 1e12) for row in table["devices"])


def peak_flops(device_name: str) -> float | None:
    """Peak operations per second of 16-bit matrix products, or None for a device that is not in the table."""
    words = device_name.replace("-", " ").split()
    for wanted, flops in _peaks():
        if all(set(word.split()) <= set(words) for word in wanted):
            return flops
    return None


@dataclass(frozen=True, slots=True)
class Flops:
    """Floating point operations of training per token, and per pair of a token and one that it attends to."""

    per_token: float
    per_pair: float


def training_flops(model: "nn.Module") -> Flops | None:
    """None for models whose cost does not follow from their number of weights: experts, low-bit weights."""
    base = unwrap(model)
    config = base.config.get_text_config()
    weights = dict(model.named_parameters())
    if "num_experts_per_tok" in config or not all(weight.is_floating_point() for weight in weights.values()):
        return None
    embedding = base.get_input_embeddings().weight
    head = base.get_output_embeddings()
    # A tied embedding is also the output head, which is a matrix product.
    counted = [w for w in weights.values() if w is not embedding or (head is not None and head.weight is w)]
    num_weights = sum(weight.numel() for weight in counted)
    num_trainable = sum(weight.numel() for weight in counted if weight.requires_grad)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    width = kinds.count("full_attention") * config.num_attention_heads * head_size
    return Flops(4.0 * num_weights + 2.0 * num_trainable, 12.0 * width)


class Utilization(TrainerCallback):
    """`mfu`: share of the device's peak FLOP/s used since training began."""

    def __init__(self, peak: float) -> None:
        self.peak = peak
        self.flops: Flops | None = None
        self.handle: Any = None
        self.num_tokens: Any = 0
        self.num_pairs: Any = 0
        self.start_seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.flops = training_flops(kwargs["model"])
        if self.flops is not None:
            self.handle = unwrap(kwargs["model"]).register_forward_pre_hook(self._count, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.handle is not None:
            self.handle.remove()

    def _count(self, module: "nn.Module", args: Any, kwargs: dict[str, Any]) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        if not self.start_seconds:
            self.start_seconds = time.monotonic()
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is not None:  # whose sums need no tensor of a size that the host has to wait for
            lengths = bounds.diff().long()
            num_tokens, num_pairs = lengths.sum(), lengths.square().sum()
            if kwargs.get("prefixes") is not None:  # a token attends to all of these, and to half of its own text
                num_pairs = num_pairs + 2 * (lengths * kwargs["prefixes"][:, 1::2].sum(1)).sum()
        else:
            lengths = sequence_lengths(kwargs)
            num_tokens, num_pairs = (lengths > 0).sum(), lengths.sum()
        self.num_tokens = self.num_tokens + num_tokens
        self.num_pairs = self.num_pairs + num_pairs

    def __call__(self) -> Mapping[str, float]:
        if self.flops is None or not self.start_seconds:
            return {}
        done = self.flops.per_token * float(self.num_tokens) + self.flops.per_pair * float(self.num_pairs)
        return {"mfu": done / (time.monotonic() - self.start_seconds) / self.peak}


def peak_memory() -> Mapping[str, float]:
    """Peak memory allocated by tensors and peak memory reserved by PyTorch, in GiB."""
    gibibyte = 2**30
    return {
        "vram_allocated": round(torch.cuda.max_memory_allocated() / gibibyte, 2),
        "vram_reserved": round(torch.cuda.max_memory_reserved() / gibibyte, 2),
    }


def gauges_of(device: str, *, is_16_bit: bool) -> list[Gauge]:
    """The gauges of this device type: `mfu` for known GPUs in 16 bits, memory with RECORD_VRAM=1."""
    if device != "cuda":
        return []
    found: list[Gauge] = []
    peak = peak_flops(torch.cuda.get_device_name()) if is_16_bit else None
    if peak is not None:
        found.append(Utilization(peak))
    if is_on(os.environ, "RECORD_VRAM"):
        found.append(peak_memory)
    return found
