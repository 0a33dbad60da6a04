"""The part of the trainer that begins a step again if it has run out of memory, with its batches in smaller parts.

A run of one process does that by itself. Several processes with whole weights (DDP) do it together, in steps that they
guard. DDP averages the gradients while the last backward pass of a step runs, and a process that runs out of memory
there would leave the others waiting. So in a guarded step each process computes the gradients of its own rows. Then all
tell each other whether the memory was enough, and either begin again or average the gradients. Other steps are DDP's
own, which hides communication behind computation.

Where weights are sharded (FSDP, DeepSpeed) or processes share tokens or layers (`sp_size`, `tp_size`), they wait for
each other in each layer. One that runs out of memory there cannot tell the others, so the run ends, and its error says
what to change.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from luthier.core.log import warn
from luthier.model.checkpointing import is_checkpointed
from luthier.model.loading.memory_check import is_out_of_memory
from luthier.stages import StageState
from luthier.training.checkpointed import CheckpointedTrainer
from luthier.training.counts import Counting
from luthier.training.cut_batches import KeepsRows, RandomState, can_begin_again, clear, cut, num_rows
from luthier.training.parts import TrainingParts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn
    from transformers import Seq2SeqTrainingArguments

FIRST_STEPS = 2
"""Guarded in any case: the optimizer allocates its state at the end of the first one."""


@dataclass(slots=True)
class BegunStep:
    """What the present optimizer step began with, so that it can begin again, and what it has done so far."""

    num_batches: int = 0
    batches: list[Any] = field(default_factory=list)
    """Those that were computed so far, or are now."""
    metrics: "dict[str, tuple[Tensor, float | Tensor]]" = field(default_factory=dict)
    random_state: RandomState = field(default_factory=RandomState.now)
    stage_state: StageState = field(default_factory=dict)
    loss: "Tensor | None" = None
    """The losses since the last line of the log, as transformers adds them up."""
    losses: "list[Tensor]" = field(default_factory=list)
    """Of the batches, since the step began or began again; of a guarded step."""
    returned: "list[Tensor]" = field(default_factory=list)
    """Those that transformers has added up."""
    fault: str | None = None
    """Why this process ran out of memory; None if it did not."""


@dataclass(slots=True)
class Guard:
    """Which steps are guarded: those that may be the first to run out of memory. All processes decide alike."""

    num_steps: int = 0
    largest: float = 0.0
    """Numbers in the largest batch of any process so far."""
    is_on: bool = False

    def begin(self, size: float) -> None:
        """`size`: numbers in the largest batch of any process in the step that begins."""
        self.is_on = self.num_steps < FIRST_STEPS or size > self.largest
        self.num_steps, self.largest = self.num_steps + 1, max(size, self.largest)


class RetryingTrainer(CheckpointedTrainer):
    """transformers.Trainer that computes a step in smaller parts if it does not fit in memory."""

    def __init__(self, args: "Seq2SeqTrainingArguments", parts: TrainingParts, **words: Any) -> None:
        self.counting = Counting(parts.collate, parts.stage.units)
        self.collate = KeepsRows(self.counting)
        super().__init__(args, parts, **words)
        self.num_parts = 1
        """Into how many parts batches are cut, so that they fit in memory."""
        self.guard = Guard()
        self._begun = BegunStep()
        self._metrics: dict[str, tuple[Tensor, float | Tensor]] = {}

    @cached_property
    def may_guard(self) -> bool:
        """Whether several processes can begin a step again together.

        Those that share the tokens of a batch cannot: they wait for each other in each layer.
        """
        model: Any = self.model_wrapped
        has_whole_weights = isinstance(model, DistributedDataParallel) and not model.static_graph
        computes_alone = self.parts.rollouts is None and self.parts.groups is None
        return has_whole_weights and computes_alone and can_begin_again(self.policy)

    def begin_step(self, batches: "Sequence[Any]", size: float) -> None:
        """`size`: as in `Guard.begin`."""
        self._begun = BegunStep(
            num_batches=len(batches),
            metrics=dict(self._metrics),
            stage_state=self.stage_state,
            loss=self._tr_loss.clone(),
        )
        if self.may_guard:
            self.guard.begin(size)

    def training_step(self, model: "nn.Module", inputs: Any, num_items_in_batch: Any = None) -> "Tensor":
        """As in transformers. If memory runs out, the step begins again with its batches cut into smaller parts."""
        self._begun.batches.append(inputs)
        if self.guard.is_on:
            return self._guarded_step(model, num_items_in_batch)
        batches = [inputs]
        while True:
            try:
                with self.stop.in_step(may_give_up=self.may_give_up_step):
                    return [self._in_parts(model, batch, num_items_in_batch) for batch in batches][-1]
            except (RuntimeError, MemoryError) as error:
                is_alone = self.accelerator.num_processes == 1 and not self.is_deepspeed_enabled
                if not (is_out_of_memory(error) and is_alone and self._can_cut_more()):
                    raise
            # Here, and not above: as long as the error is handled, it holds the tensors of the step.
            batches = self._begin_again()

    def _in_parts(self, model: "nn.Module", batch: Any, num_items: Any) -> "Tensor":
        """Forward and backward of a batch; its loss. DDP averages the gradients with the last part."""
        losses: list[Tensor] = []
        num_parts = min(self.num_parts, num_rows(batch))
        for part in cut(batch, self.num_parts, self.collate):
            is_last = len(losses) == num_parts - 1
            alone = nullcontext() if is_last or not isinstance(model, DistributedDataParallel) else model.no_sync()
            with alone:
                losses.append(super().training_step(model, part, num_items))
        return torch.stack(losses).sum() if len(losses) > 1 else losses[0]

    def memory_remedy(self) -> str:
        """What to change after running out of memory."""
        args, saved = self.args, self.last_saved
        rows = max(map(num_rows, self._begun.batches), default=1)
        is_shared = self.accelerator.num_processes > 1 and not isinstance(self.model_wrapped, DistributedDataParallel)
        found = fewer_rows(args.per_device_train_batch_size, args.gradient_accumulation_steps)
        if found is None or rows <= self.num_parts:  # a single row was too much
            found = "lower cutoff_len"
            if not is_checkpointed(self.policy):
                found = f"set disable_gradient_checkpointing: false, or {found}"
            if is_shared:
                found += ", or start more processes"
        return found + (f", and start again, which continues from {saved}" if saved is not None else "")

    def _can_cut_more(self) -> bool:
        return max(map(num_rows, self._begun.batches)) > self.num_parts and can_begin_again(self.policy)

    def _begin_again(self) -> list[Any]:
        """Undo what the step has done so far; the batches to compute again."""
        begun, rows = self._begun, max(map(num_rows, self._begun.batches))
        before, after = (-(-rows // num_parts) for num_parts in (self.num_parts, 2 * self.num_parts))
        self.num_parts *= 2
        clear(self.policy)
        self._metrics = dict(begun.metrics)
        begun.losses, begun.fault = [], None
        self.watch.forget()
        begun.random_state.restore()
        warn(
            f"out of memory at step {self.state.global_step + 1} with {before} rows at a time;"
            f" from now on {after} at a time are computed, with the same losses and updates"
        )
        return begun.batches

    # -- several processes ------------------------------------------------------------------------

    def _guarded_step(self, model: Any, num_items: Any) -> "Tensor":
        """One batch of a guarded step. The last one ends when the gradients are those of all processes."""
        begun = self._begun
        if begun.fault is None:
            self._compute(model, begun.batches[-1:], num_items)
        is_again = False
        while len(begun.batches) == begun.num_batches and self._is_memory_out():
            is_again = True
            self._compute(model, self._begin_again(), num_items)
        if is_again:
            loss = torch.stack(begun.losses).sum() - sum(begun.returned)
        else:
            loss = begun.losses[-1] if begun.fault is None else torch.zeros((), device=self.args.device)
        begun.returned.append(loss)
        if len(begun.batches) == begun.num_batches:
            average_gradients(model)
            model.require_forward_param_sync = True
        return loss

    def _compute(self, model: Any, batches: "Sequence[Any]", num_items: Any) -> None:
        """The gradients of this process alone."""
        model.require_forward_param_sync = False  # no broadcast of buffers, which one process may not come to
        try:
            with model.no_sync():
                for batch in batches:
                    self._begun.losses.append(self._in_parts(model, batch, num_items))
            return
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._begun.fault = str(error) or "MemoryError"  # the error itself would hold the tensors of the step
        clear(self.policy)

    def _is_memory_out(self) -> bool:
        """Whether any process ran out of memory. If that one cannot cut its batches further, all raise its error."""
        fault = self._begun.fault
        mine = [fault is not None, fault is not None and not self._can_cut_more()]
        is_out, is_final = self.accelerator.gather(torch.tensor([mine], device=self.args.device)).any(0).tolist()
        if is_final:
            raise torch.OutOfMemoryError(fault or "another process of this run needs more memory than it has")
        return bool(is_out)


def average_gradients(model: DistributedDataParallel) -> None:
    """Over all processes, as DDP does. A weight that only some of them have used has no gradient in the others."""
    named, ignored = model.module.named_parameters(), model.parameters_to_ignore
    weights = [weight for name, weight in named if weight.requires_grad and name not in ignored]
    is_used = torch.tensor([weight.grad is not None for weight in weights], device=model.device, dtype=torch.int32)
    distributed.all_reduce(is_used, distributed.ReduceOp.MAX, group=model.process_group)
    for weight, is_used_by_any in zip(weights, is_used.tolist(), strict=True):
        if is_used_by_any:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            weight.grad.mul_(1 / distributed.get_world_size(model.process_group))
            distributed.all_reduce(weight.grad, group=model.process_group)


def fewer_rows(size: int, accumulated: int) -> str | None:
    """The keys of smaller batches with the same rows in a step; None for batches of one row."""
    divisor = next((number for number in range(2, size + 1) if size % number == 0), None)
    if divisor is None:
        return None
    return (
        f"set per_device_train_batch_size: {size // divisor} and gradient_accumulation_steps: {accumulated * divisor},"
        " which has the same losses"
    )


def size_of(batch: "Mapping[str, Any]") -> int:
    """The numbers in the tensors of a batch."""
    return sum(value.numel() for value in batch.values() if isinstance(value, torch.Tensor))
