"""Stops a run whose loss or weights are NaN or infinite, and names the step and the rows."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from luthier.core.errors import RunFailed
from luthier.training.checkpoints import newest_whole

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedTokenizerBase

SHOWN_CHARACTERS = 60
"""Shown of each row of the batch."""
SHOWN_ROWS = 8


class NonFiniteWatch:
    """Keeps the losses of one optimizer step and checks them when the next one begins, or before they are logged.

    By then they have been computed, so the check does not stall the accelerator.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", output_dir: Path) -> None:
        self._tokenizer, self._output_dir = tokenizer, output_dir
        self._seen: list[tuple[Mapping[str, Any], Tensor]] = []

    def note(self, batch: Mapping[str, Any], loss: "Tensor") -> None:
        self._seen.append((batch, loss.detach()))

    def forget(self) -> None:
        """The losses noted since the last check belong to a step that begins again."""
        self._seen = []

    def require_finite_losses(self, num_steps: int) -> None:
        """Checks the losses of step `num_steps`. Raises `RunFailed` with the rows of the batch."""
        seen, self._seen = self._seen, []
        if not seen or bool(torch.stack([loss for _, loss in seen]).isfinite().all()):
            return
        batch, loss = next(pair for pair in seen if not pair[1].isfinite())
        rows = "".join(f"\n  {text}" for text in self._shown(batch))
        raise self.failure(f"the loss became {loss.item()}", num_steps, f"; the rows of this batch:{rows}")

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

    def _shown(self, batch: Mapping[str, Any]) -> list[str]:
        """The first characters of each sequence of a batch."""
        ids = batch["input_ids"]
        if "cu_seq_lens_q" in batch:
            sequences = [ids[0, start:end] for start, end in pairwise(batch["cu_seq_lens_q"].tolist())]
        else:
            mask = batch["attention_mask"].bool()
            sequences = [row[own] for row, own in zip(ids, mask, strict=True)]
        texts = [str(self._tokenizer.decode(sequence.tolist())) for sequence in sequences[:SHOWN_ROWS]]
        shown = [repr(text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…") for text in texts]
        hidden = len(sequences) - len(shown)
        return [*shown, *([f"and {hidden} more"] if hidden > 0 else [])]
