"""Drawing tokens so that an answer depends on its own random numbers, and not on which others stand in its batch.

B answers, V vocabulary. transformers draws the tokens of a whole batch from one stream of random numbers, so another
batch or another process gives other answers. Here each answer has a stream of its own, and a token is found by
inverting the distribution function: the first v with P(1) + ... + P(v) > u, u uniform in [0, 1).
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList


def uniforms(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """(B, num_tokens) float64, row b from `seeds[b]` alone."""
    rows = [
        torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds
    ]
    return torch.stack(rows)


def drawn(scores: Tensor, numbers: Tensor) -> Tensor:
    """(B,) the tokens that (B,) uniform `numbers` draw from the (B, V) logits `scores`."""
    cumulated = scores.double().softmax(-1).cumsum(-1)
    # The sum of all probabilities is 1 but for rounding; a token with none is never found.
    found = torch.searchsorted(cumulated, (numbers * cumulated[:, -1])[:, None], right=True)
    return found.squeeze(-1)


class OwnDraws(LogitsProcessor):
    """Leaves the drawn token as the only possible one. It must come behind whatever shapes the distribution."""

    def __init__(self, numbers: Tensor, num_prompt_tokens: int) -> None:
        """`numbers`: (B, tokens of an answer), of `uniforms`."""
        self.numbers, self.num_prompt_tokens = numbers, num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = drawn(scores, self.numbers[:, input_ids.shape[1] - self.num_prompt_tokens])
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)

    def sample(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        **options: Any,
    ) -> Any:
        """The sampling loop of transformers, for `generate(custom_generate=...)`: there temperature and the like are
        already in the list, which they are not yet where a processor is given to `generate`. One token is left, so the
        largest is taken, and nothing is drawn from the distribution once more.
        """
        takes_largest = copy(generation_config)
        takes_largest.do_sample = False
        processors = LogitsProcessorList([*logits_processor, self])
        return model._sample(input_ids, logits_processor=processors, generation_config=takes_largest, **options)
