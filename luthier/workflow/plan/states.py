"""What the optimizers of `optim` keep for the weights that they train.

format of the weight   optimizers of PyTorch and of most libraries
float32                bitsandbytes, whatever the format of the weight
8 bits, 4 bits         a byte or half of one, and a float32 scale for each block of numbers. A tensor of less than 4,096
                       numbers is kept in full. bitsandbytes keeps embeddings in float32, as transformers tells it.

A test compares these with the optimizers (`tests/workflow/plan/test_states.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.training.optimizers import SMALLEST_OF_8_BITS

if TYPE_CHECKING:
    from torch import Tensor, nn

BLOCKS = {8: 256, 4: 128}
"""Bits -> numbers that share a scale."""
FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class States:
    """Of one optimizer."""

    number: float
    """Numbers for each trained number."""
    bits: int | None = None
    """None: in the format of the weight."""
    of_torchao: bool = False

    def num_bytes(self, num_numbers: int, number_bytes: int, *, is_embedding: bool) -> float:
        """For a tensor of `num_numbers` numbers of `number_bytes` bytes."""
        full_bytes = number_bytes if self.bits is None or self.of_torchao else FLOAT32_BYTES
        if self.bits not in BLOCKS or self._stays_full(num_numbers, BLOCKS[self.bits], is_embedding=is_embedding):
            return self.number * num_numbers * full_bytes
        return self.number * num_numbers * (self.bits / 8 + FLOAT32_BYTES / BLOCKS[self.bits])

    def _stays_full(self, num_numbers: int, block: int, *, is_embedding: bool) -> bool:
        if num_numbers < SMALLEST_OF_8_BITS:
            return True
        return num_numbers % block > 0 if self.of_torchao else is_embedding


ADAMW = States(2)
STATES = {
    **dict.fromkeys(("sgd", "adafactor", "lomo", "adalomo"), States(0)),
    **dict.fromkeys(("adagrad", "rmsprop", "schedule_free_sgd"), States(1)),
    **dict.fromkeys(("lion_32bit", "paged_lion_32bit", "rmsprop_bnb", "rmsprop_bnb_32bit"), States(1, 32)),
    **dict.fromkeys(("lion_8bit", "paged_lion_8bit", "rmsprop_bnb_8bit"), States(1, 8)),
    "paged_adamw_32bit": States(2, 32),
    **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit"), States(2, 8)),
    "adamw_torch_8bit": States(2, 8, of_torchao=True),
    "adamw_torch_4bit": States(2, 4, of_torchao=True),
    "grokadamw": States(3),
    **dict.fromkeys(("ademamix", "paged_ademamix_32bit"), States(3, 32)),
    **dict.fromkeys(("ademamix_8bit", "paged_ademamix_8bit"), States(3, 8)),
}
"""`optim` -> its states; what is not here has those of AdamW."""


def states_of(optim: str) -> States:
    return STATES.get(optim, ADAMW)


def states_bytes(optim: str, model: "nn.Module", share: "Callable[[Tensor], int] | None" = None) -> int:
    """For the trained weights of `model`. `share`: how many numbers of a weight this process has; None: all."""
    from torch import nn

    states, total = states_of(optim), 0.0
    embeddings = {
        id(weight) for part in model.modules() if isinstance(part, nn.Embedding) for weight in part.parameters()
    }
    for weight in model.parameters():
        if weight.requires_grad:
            number = weight.numel() if share is None else share(weight)
            total += states.num_bytes(number, weight.element_size(), is_embedding=id(weight) in embeddings)
    return round(total)
