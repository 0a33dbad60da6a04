"""`reward_model`: a model trained with stage: rm scores answers on this machine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.data.collate import model_inputs
from luthier.data.rows.columns import BLOCKS, IMAGES
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.model.fitting import FittingBatch
from luthier.model.heads.score_head import position_scores
from luthier.training.distributed.sums import Collate, batch_by_batch
from luthier.training.rewards import Answered, checked

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class RewardModel:
    """A reward model, held in memory next to the policy."""

    name: str
    model: "nn.Module"
    closing_ids: tuple[int, ...]
    """What the chat format writes after the stop token, as in the reward model's training."""
    collate: Collate
    batch_size: int
    """How many answers are scored at once, if memory holds them."""
    batch: FittingBatch = field(default_factory=lambda: FittingBatch("answers scored"))

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        rows = [self._row(answered) for answered in answers]
        # Neighbors of about the same length need little padding.
        order = sorted(range(len(rows)), key=lambda number: -len(rows[number]["input_ids"]))
        device = next(self.model.parameters()).device

        def compute(batch: dict[str, Any]) -> list[float]:
            found: list[float] = position_scores(self.model, model_inputs(batch))[batch["ends"]].tolist()
            return found

        def scored(numbers: Sequence[int], num_together: int) -> Iterator[float]:
            for start in range(0, len(numbers), num_together):
                chosen = [rows[order[number]] for number in numbers[start : start + num_together]]
                (scores,) = batch_by_batch([self.collate(chosen)], device, compute)
                yield from scores

        found = dict(zip(order, self.batch.results(scored, len(rows), self.batch_size), strict=True))
        return checked(f"reward_model: {self.name}", [found[number] for number in range(len(rows))], answers)

    def _row(self, answered: Answered) -> dict[str, Any]:
        closing = self.closing_ids if answered.stopped else ()
        ids = [*answered.prompt_ids, *answered.answer_ids, *closing]
        media = {IMAGES.name: answered.media, BLOCKS.name: answered.blocks}
        return {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids), **media}
