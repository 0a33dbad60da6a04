"""Finds a loss, a gradient or a weight that is NaN or infinite, and names the step and the rows."""

import math
from collections.abc import Mapping
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.core.errors import RunFailed
from luthier.core.log import warn
from luthier.data.collate import SLICE_START
from luthier.training.checkpoints.store import newest_whole
from luthier.training.watch.spikes import Spikes

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

SHOWN_CHARACTERS = 60
"""Shown of each row of the batch."""
SHOWN_ROWS = 8


class NonFiniteWatch:
    """Keeps the losses and the gradient norm of one optimizer step and checks them when the next one begins, or before
    they are logged or saved.

    By then they have been computed, so the check does not stall the accelerator.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", output_dir: Path) -> None:
        self._tokenizer, self._output_dir = tokenizer, output_dir
        self._seen: list[tuple[Mapping[str, Any], Tensor]] = []
        self._norm: Tensor | None = None
        self._read: list[float] | None = None
        """The losses and then the norm, once the host has waited for them."""
        self._spikes = Spikes()

    def note(self, batch: Mapping[str, Any], loss: "Tensor") -> None:
        """`loss`: the share of this batch in the loss of the step."""
        self._seen.append((batch, loss.detach()))
        self._read = None

    def note_gradient(self, norm: "Tensor") -> None:
        self._norm, self._read = norm.detach(), None

    def forget(self) -> None:
        """What was noted since the last check belongs to a step that begins again, or has been dealt with."""
        self._seen, self._norm, self._read = [], None, None

    def require_finite_step(self, num_steps: int) -> None:
        """Checks losses and gradient of step `num_steps`. Raises `RunFailed` with its rows; warns of a spike."""
        if not self._seen:
            return
        fault = self.fault()
        if fault:
            raise self.failure(fault, num_steps, f"; the rows of this step:{listed(self.rows())}")
        remark = self._spikes.remark(sum(self._losses()))
        if remark:
            warn(f"step {num_steps}: {remark}; the rows of this step:{listed(self.rows())}")
        self.forget()

    def fault(self) -> str:
        """What is not finite in the step that was noted, e.g. `the loss became nan`; nothing if all of it is finite."""
        loss = next((loss for loss in self._losses() if not math.isfinite(loss)), None)
        if loss is not None:
            return f"the loss became {loss}"
        norms = self._numbers()[len(self._seen) :]
        return "" if all(map(math.isfinite, norms)) else f"the norm of the gradient became {norms[0]}"

    def _losses(self) -> list[float]:
        return self._numbers()[: len(self._seen)]

    def _numbers(self) -> list[float]:
        """All that was noted. The host waits for the accelerator once, however many batches the step has."""
        if self._read is None:
            norm = [] if self._norm is None else [self._norm.to(self._seen[0][1])]
            self._read = torch.stack([loss for _, loss in self._seen] + norm).tolist()
        return self._read

    def rows(self) -> list[str]:
        """The first characters of the rows that the fault may come from: those of the first batch whose loss is not
        finite, else those of the whole step."""
        seen = [batch for batch, _ in self._seen]
        batches = [batch for batch, loss in zip(seen, self._losses(), strict=True) if not math.isfinite(loss)][
            :1
        ] or seen
        sequences = [sequence for batch in batches for sequence in _sequences(batch)]
        texts = [str(self._tokenizer.decode(sequence.tolist())) for sequence in islice(sequences, SHOWN_ROWS)]
        shown = [repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…") for text in texts]
        hidden = len(sequences) - len(shown)
        return [*shown, *([f"and {hidden} more"] if hidden > 0 else [])]

    def require_finite_weights(self, model: "nn.Module", num_steps: int) -> None:
        """Non-finite weights must not overwrite good ones. Raises `RunFailed`."""
        for name, weight in model.named_parameters():
            if weight.requires_grad and not weight.isfinite().all():
                raise self.failure(f"the weight {name} is not finite", num_steps)

    def failure(self, what: str, num_steps: int, more: str = "") -> RunFailed:
        last = newest_whole(self._output_dir)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint was saved before"
        return RunFailed(
            f"{what} at step {num_steps}; {kept} -> lower learning_rate, or train in float32 or bf16{more}"
        )


def listed(rows: list[str]) -> str:
    return "".join(f"\n  {row}" for row in rows)


def _sequences(batch: Mapping[str, Any]) -> "list[Tensor]":
    ids = batch["input_ids"]
    if "cu_seq_lens_q" in batch:
        offset, length = batch.get(SLICE_START, 0), ids.shape[1]
        bounds = [min(max(bound - offset, 0), length) for bound in batch["cu_seq_lens_q"].tolist()]
        texts = [ids[0, start:end] for start, end in pairwise(bounds) if start < end]
        if "prefixes" not in batch:
            return texts
        prefixes = batch["prefixes"].unflatten(1, (-1, 2)).tolist()
        shared = [[ids[0, first : first + number] for first, number in runs] for runs in prefixes]
        return [torch.cat([*before, own]) for before, own in zip(shared, texts, strict=True)]
    mask = batch["attention_mask"].bool()
    return [row[own] for row, own in zip(ids, mask, strict=True)]
