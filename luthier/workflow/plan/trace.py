"""One training step on tensors without data: the bytes in memory at the same time, and the work of each operation.

The model and the head run as in training, forward and backward, on PyTorch's `meta` device, where an operation gives
shapes and no numbers. So what is counted is what the code does, whatever the architecture, adapter or kernel.

N tokens of a batch, K labeled positions, H hidden size, V vocabulary.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.model.compat.autocast_without_data import autocast_of_cpu
from luthier.model.frozen_models import SeparateModel
from luthier.model.heads.output_head import OutputHead, summed_loss, token_logps
from luthier.model.heads.score_head import position_scores
from luthier.model.kernels import varlen
from luthier.model.modules import unwrap
from luthier.model.types import Models
from luthier.workflow.plan.calls import Calls
from luthier.workflow.plan.counter import StepCounter

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun
    from luthier.stages import Stage

aten = torch.ops.aten
_PRODUCTS = (torch.nn.functional.linear, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm)
"""What autocast computes in 16 bits, besides attention."""
_GROUPED = (torch.nn.functional.grouped_mm, torch._grouped_mm)
"""Tokens with the experts that they are routed to, which autocast does not round."""
LossOf = Callable[..., Tensor]
"""(model, head, inputs, batch) -> the loss."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The size of a batch."""

    lengths: tuple[int, ...]
    """Tokens of each sample, padding included."""
    num_targets: int
    is_padded: bool = False
    prefixes: tuple[tuple[int, ...], ...] | None = None
    """As in `luthier.data.shared_prefixes`; None if nothing is shared."""
    num_parts: int = 1
    """Processes that share its tokens (`sp_size`)."""

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def own_tokens(self) -> int:
        """Of one process."""
        return -(-self.num_tokens // self.num_parts)


@dataclass(frozen=True, slots=True)
class Trace:
    """Bytes beside the weights, and operations, of the forward and backward pass of a batch."""

    early_bytes: int
    """The most in the forward pass and the first half of the backward pass, where activations are many."""
    late_bytes: int
    """The most in the second half of the backward pass, where gradients are many."""
    logits_bytes: int
    """The most that tensors as wide as the vocabulary take."""
    calls: Calls

    @property
    def peak_bytes(self) -> int:
        return max(self.early_bytes, self.late_bytes)

    @property
    def num_operations(self) -> int:
        """Floating-point operations of products and attention."""
        return round(sum(call.operations * count for call, count in self.calls.items()))

    def extended(self, longer: "Trace", steps: float) -> "Trace":
        """What follows after `steps` times the difference to `longer`: every layer adds the same."""

        def line(first: int, second: int) -> int:
            return round(first + (second - first) * steps)

        return Trace(
            line(self.early_bytes, longer.early_bytes),
            line(self.late_bytes, longer.late_bytes),
            max(self.logits_bytes, longer.logits_bytes),
            self._calls_extended(longer, steps),
        )

    def _calls_extended(self, longer: "Trace", steps: float) -> Calls:
        found = {}
        for call in {*self.calls, *longer.calls}:
            count = self.calls.get(call, 0)
            found[call] = count + (longer.calls.get(call, 0) - count) * steps
        return {call: count for call, count in found.items() if count}


def trace_step(
    model: nn.Module,
    batch: Batch,
    *,
    reads: str,
    half: torch.dtype | None,
    accumulates: bool = False,
    keeps_gradients: bool = True,
    is_sharded: bool = False,
    on_device: bool = False,
    loss_of: LossOf | None = None,
    counter: "StepCounter | None" = None,
) -> Trace:
    """`model` is on the `meta` device, in training mode. `reads`: `Stage.reads`, or `score`. `half`: the format of
    autocast. `accumulates`: the gradients of earlier batches are in memory. `keeps_gradients` false: each goes as soon
    as it is there. `is_sharded`: the model computes its logits itself, as with FSDP and DeepSpeed. `on_device`: of an
    accelerator, not of a CPU. `loss_of`: a loss that runs more than the model, instead of what `reads` says. `counter`:
    one that knows the states of an optimizer which steps in the backward pass."""
    head = _head_of(model)
    if is_sharded:
        head = OutputHead(None, head.takes_positions)
    counter = counter or StepCounter(model)
    counter.restart()
    states_bytes = counter.live_bytes
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    inputs = _inputs(batch)
    attending = varlen.traced() if on_device else contextlib.nullcontext()
    autocast = torch.autocast("cpu", dtype=half, enabled=half is not None)
    substitutes = Substitutes(half, on_device=on_device)
    with attending, autocast, autocast_of_cpu(), substitutes, substitutes.absent_from_optimizers(), counter:
        if accumulates and keeps_gradients:
            for weight in weights:
                weight.grad = torch.empty_like(weight)
        hooks = [] if keeps_gradients else [w.register_post_accumulate_grad_hook(_drop_gradient) for w in weights]
        loss = (loss_of or _LOSSES[reads])(model, head, inputs, batch)
        num_forward = counter.num_calls
        _backward(loss)
    for weight in weights:
        weight.grad = None
    for hook in hooks:
        hook.remove()
    middle = (num_forward + counter.num_calls) // 2
    return Trace(
        max(counter.history[:middle], default=states_bytes) - states_bytes,
        max(counter.history[middle:], default=states_bytes) - states_bytes,
        counter.most_logits,
        counter.calls,
    )


def trace_pass(model: nn.Module, batch: Batch, *, reads: str, half: torch.dtype | None, on_device: bool = False) -> int:
    """The most bytes beside the weights in a pass without gradients, as in an evaluation. As `trace_step`."""
    counter, was_training = StepCounter(model), model.training
    attending = varlen.traced() if on_device else contextlib.nullcontext()
    autocast = torch.autocast("cpu", dtype=half, enabled=half is not None)
    model.eval()
    with torch.no_grad(), attending, autocast, autocast_of_cpu(), Substitutes(half, on_device=on_device), counter:
        _LOSSES[reads](model, _head_of(model), _inputs(batch), batch)
    model.train(was_training)
    return max(counter.history, default=0)


def against_frozen(stage: "Stage", run: "TrainRun", names: Sequence[str]) -> LossOf:
    """The loss of a stage that runs frozen models, `names`, at each step. The policy stands for them."""

    def loss_of(model: nn.Module, head: OutputHead, inputs: dict[str, Any], batch: Batch) -> Tensor:
        frozen = {name: SeparateModel(model, head) for name in names}
        given = {**inputs, "positions": _positions(batch), "targets": _positions(batch)}
        output = stage.loss(Models(model, head, frozen), given, run.method, state=None, training=True)
        total: Tensor = output.total
        return total

    return loss_of


def _backward(loss: Tensor) -> None:
    """As `loss.backward()`, where torch leaves out `Substitutes`; layers that are computed again need them."""
    graph: Any = torch.autograd.graph
    graph._engine_run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (), allow_unreachable=True, accumulate_grad=True
    )


def _drop_gradient(weight: Tensor) -> None:
    weight.grad = None


def _inputs(batch: Batch) -> dict[str, Any]:
    with torch.device("meta"):
        if batch.is_padded:
            ids = torch.empty(len(batch.lengths), max(batch.lengths), dtype=torch.long)
            return {"input_ids": ids, "attention_mask": torch.empty_like(ids)}
        ids = torch.empty(1, batch.own_tokens, dtype=torch.long)
    # Attention reads these numbers, so they are real. A row that is shared is filled up by a sample of its own.
    num_filled = batch.own_tokens * batch.num_parts - batch.num_tokens
    lengths = (*batch.lengths, num_filled) if num_filled else batch.lengths
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    longest = max(batch.lengths)
    inputs = {"input_ids": ids, "position_ids": torch.empty_like(ids)}
    inputs |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
    if batch.prefixes is not None:
        inputs["prefixes"] = torch.tensor(batch.prefixes, dtype=torch.int32)
    return {**inputs, "max_length_q": longest, "max_length_k": longest}


def _head_of(model: nn.Module) -> OutputHead:
    """As `inspect_head`, which needs numbers, would find it."""
    base = unwrap(model)
    takes_positions = "logits_to_keep" in inspect.signature(base.forward).parameters
    if not takes_positions:
        return OutputHead(None, takes_positions=False)
    layer = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    config = base.config.get_text_config()
    caps = [getattr(config, name, None) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
    is_plain = type(layer) is nn.Linear and not any(value not in (None, 1, 1.0) for value in caps)
    return OutputHead(layer if is_plain else None, takes_positions=True)


def _positions(batch: Batch) -> Tensor:
    """At worst all tokens of a process have a target."""
    return torch.empty(min(batch.num_targets, batch.own_tokens), dtype=torch.long, device="meta")


def _cross_entropy(model: nn.Module, head: OutputHead, inputs: dict[str, Any], batch: Batch) -> Tensor:
    return summed_loss(model, head, inputs, _positions(batch), _positions(batch))[0]


def _logps(model: nn.Module, head: OutputHead, inputs: dict[str, Any], batch: Batch) -> Tensor:
    return token_logps(model, head, inputs, _positions(batch), _positions(batch))[0].sum()


def _scores(model: nn.Module, head: OutputHead, inputs: dict[str, Any], batch: Batch) -> Tensor:
    return position_scores(model, inputs).sum()


_LOSSES: dict[str, LossOf] = {"cross_entropy": _cross_entropy, "logps": _logps, "score": _scores}


class Substitutes(TorchFunctionMode):
    """What a real device does and `meta` does not: fused attention, experts, and autocast."""

    def __init__(self, half: torch.dtype | None, *, on_device: bool = False) -> None:
        super().__init__()
        self.half, self.on_device = half, on_device
        self.cast: dict[int, Tensor] = {}
        """Autocast keeps the 16-bit copy of a trainable weight for the whole pass."""
        self.num_stepping = 0
        """Optimizers that step now; one may step within another."""

    @contextlib.contextmanager
    def absent_from_optimizers(self) -> Iterator[None]:
        """Those that step in the backward pass do so without autocast."""

        def count(change: int) -> None:
            self.num_stepping += change

        hooks = (
            register_optimizer_step_pre_hook(lambda *_: count(1)),
            register_optimizer_step_post_hook(lambda *_: count(-1)),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.num_stepping:
            return func(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            dtype = self._halved(args[0]).dtype
            # On a CPU 16-bit attention runs in float32 (`luthier.model.attention`).
            computed_in = dtype if self.on_device else torch.float32
            query, key, value = (states.to(computed_in) for states in args[:3])
            mask = kwargs.get("attn_mask")
            if mask is not None and mask.dtype == torch.bool:
                mask = torch.empty_like(mask, dtype=query.dtype)
            found = aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, kwargs.get("dropout_p", 0.0), kwargs.get("is_causal", False),
                attn_mask=mask, scale=kwargs.get("scale"),
            )[0]  # fmt: skip
            # Without data it is as wide as the queries, and it may be narrower (latent attention).
            return found[..., : value.shape[-1]].to(dtype)
        if func is torch.histc:
            return args[0].new_empty(kwargs["bins"], dtype=torch.float32)
        if func in _GROUPED:
            # Each token meets one of the experts, and the gradient is of all of them.
            tokens, experts = args[:2]
            return torch.mm(tokens.to(experts.dtype), experts[0])
        if self.half is not None and func in _PRODUCTS:
            return func(*map(self._halved, args), **{name: self._halved(value) for name, value in kwargs.items()})
        return func(*args, **kwargs)

    def _halved(self, value: Any) -> Any:
        if self.half is None or not isinstance(value, Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, nn.Parameter):
            return value.to(self.half)
        if id(value) not in self.cast:
            self.cast[id(value)] = value.to(self.half)
        return self.cast[id(value)]


class Affirming(TorchDispatchMode):
    """While open, any question about the numbers of a tensor is answered with yes, e.g. whether none of them is 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return 1 if func is aten._local_scalar_dense.default else func(*args, **(kwargs or {}))
