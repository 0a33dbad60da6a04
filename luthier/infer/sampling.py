"""Sampling that depends on an answer's own random numbers, not on the other answers in its batch.

B answers, V vocabulary. transformers samples a whole batch from one random stream, so another batch size or another
process gives other answers. Here each answer has its own stream, and a token is sampled by inverting the distribution
function: the first v with P(1) + ... + P(v) > u, u uniform in [0, 1).

`chosen_tokens` chooses the next tokens of answers with the same settings. `PerAnswerSampler` does so inside `generate`,
for models whose answers cannot share a batch of `luthier.infer.batching`.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from luthier.core.errors import InvalidInput, RunFailed
from luthier.infer.types import Settings

COLDEST = 1e-30
"""A lower temperature chooses the same tokens, and logits divided by it are beyond float32."""


def uniforms(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """(B, num_tokens) float64 in [0, 1); row b depends on `seeds[b]` only."""
    rows = [
        torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds
    ]
    return torch.stack(rows)


def sample_tokens(scores: Tensor, numbers: Tensor) -> Tensor:
    """(B,) token ids, sampled from the (B, V) logits `scores` with the (B,) uniform `numbers`."""
    cumulated = scores.double().softmax(-1).cumsum(-1)
    # The probabilities sum to 1 only up to rounding. A token of probability 0 is never found.
    found = torch.searchsorted(cumulated, (numbers * cumulated[:, -1])[:, None], right=True)
    if bool((found == scores.shape[-1]).any()):  # the sums are not numbers
        if bool(scores.isnan().any()):
            raise no_numbers()
        raise InvalidInput("temperature, penalties and logit_bias leave no token with a probability")
    return found.squeeze(-1)


def largest_tokens(scores: Tensor) -> Tensor:
    """(B,) the tokens with the largest of the (B, V) logits. Raises `RunFailed` for logits that are NaN."""
    values, found = scores.max(-1)
    if bool(values.isnan().any()):
        raise no_numbers()
    return found


def no_numbers() -> RunFailed:
    """The error for a model whose logits are NaN, of which any token or score could be said."""
    return RunFailed(
        "the logits of the model are NaN -> load it with infer_dtype: bfloat16 or float32, since float16 may overflow;"
        " if they stay NaN, its weights are damaged"
    )


def chosen_tokens(scores: Tensor, settings: Settings, numbers: Tensor, min_p: float = 0.0) -> Tensor:
    """(B,) the next tokens of answers with the same settings, from the (B, V) logits and the (B,) uniform `numbers`.

    `min_p`: that of the settings or of the model. The candidates are those of transformers' temperature, top-k, top-p
    and min-p, in this order. They are cut down before they are sorted, since sorting a vocabulary takes longer than a
    small model.
    """
    values = scores / max(settings.temperature, COLDEST)
    ids: Tensor | None = None
    if 0 < settings.top_k < values.shape[-1]:
        values, ids = values.topk(settings.top_k)
    if settings.top_p < 1 or min_p > 0:
        if ids is None:
            values, ids = values.sort(descending=True)
        probabilities = values.softmax(-1)
        kept = probabilities.cumsum(-1) - probabilities < settings.top_p
        kept &= probabilities >= min_p * probabilities[:, :1]
        kept[:, 0] = True
        values = values.masked_fill(~kept, -torch.inf)
    if ids is not None:  # in the order of the vocabulary, so that two nearly equal logits may change places
        ids, order = ids.sort()
        values = values.gather(-1, order)
    places = sample_tokens(values, numbers)
    return places if ids is None else ids.gather(-1, places[:, None]).squeeze(-1)


class PerAnswerSampler(LogitsProcessor):
    """Leaves the sampled token as the only possible one. It must be the last processor of the list."""

    def __init__(self, numbers: Tensor, num_prompt_tokens: int) -> None:
        """`numbers`: (B, tokens of an answer) from `uniforms`."""
        self.numbers, self.num_prompt_tokens = numbers, num_prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens = sample_tokens(scores, self.numbers[:, input_ids.shape[1] - self.num_prompt_tokens])
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
        """The sampling loop of transformers, for `generate(custom_generate=...)`.

        There the list already contains temperature and the like; a processor given to `generate` would come before
        them. Only one token is left, so greedy decoding picks it and nothing is sampled twice.
        """
        takes_largest = copy(generation_config)
        takes_largest.do_sample = False
        processors = LogitsProcessorList([*logits_processor, self])
        return model._sample(input_ids, logits_processor=processors, generation_config=takes_largest, **options)
