"""`reward_model`: a model trained with stage: rm scores answers on this machine."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from luthier.model.heads.score_head import position_scores
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

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        scores = []
        device = next(self.model.parameters()).device
        with torch.no_grad():
            for answered in answers:
                closing = self.closing_ids if answered.stopped else ()
                ids = torch.tensor([[*answered.prompt_ids, *answered.answer_ids, *closing]], device=device)
                scores.append(position_scores(self.model, {"input_ids": ids})[-1].item())
        return checked(f"reward_model: {self.name}", scores, answers)
