"""`reward_model`: a model trained with stage: rm scores answers on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from luthier.data.pixels import Pixels, Prompts
from luthier.model.heads.score_head import position_scores
from luthier.training.distributed import to_device
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
    pixels: "Pixels | None" = None
    """Of a model that sees; None for prompts of text."""

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        scores = []
        device = next(self.model.parameters()).device
        with torch.no_grad():
            for answered in answers:
                closing = self.closing_ids if answered.stopped else ()
                ids = [*answered.prompt_ids, *answered.answer_ids, *closing]
                inputs = {"input_ids": torch.tensor([ids])}
                if self.pixels is not None:
                    row = {"input_ids": ids, "images": answered.media, "blocks": answered.blocks}
                    inputs |= Prompts(self.pixels, [row]).inputs([0], inputs["input_ids"])
                scores.append(position_scores(self.model, to_device(inputs, device))[-1].item())
        return checked(f"reward_model: {self.name}", scores, answers)
