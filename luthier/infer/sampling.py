"""Drawing tokens so that an answer depends on its own random numbers, and not on which others stand in its batch.

Several answers to one prompt share its reading. B answers, V vocabulary. transformers draws the tokens of a whole batch
from one stream of random numbers, so another batch or another process gives other answers. Here each answer has a
stream of its own, and a token is found by inverting the distribution function: the first v with P(1) + ... + P(v) > u,
u uniform in [0, 1).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from luthier.model.features.mixture_of_depths import CACHE_NAMES

BY_ROW = frozenset({"attention_mask", "position_ids", "token_type_ids"})
"""Tensors that `generate` hands to the model beside the prompts, with a row for each."""


def uniforms(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """(B, num_tokens) float64, row b from `seeds[b]` alone."""
    rows = [
        torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds
    ]
    return torch.stack(rows)


def sample_tokens(scores: Tensor, numbers: Tensor) -> Tensor:
    """(B,) the tokens that (B,) uniform `numbers` draw from the (B, V) logits `scores`."""
    cumulated = scores.double().softmax(-1).cumsum(-1)
    # The sum of all probabilities is 1 but for rounding; a token with none is never found.
    found = torch.searchsorted(cumulated, (numbers * cumulated[:, -1])[:, None], right=True)
    return found.squeeze(-1)


class PerAnswerSampler(LogitsProcessor):
    """Leaves the drawn token as the only possible one. It must come behind whatever shapes the distribution."""

    def __init__(self, numbers: Tensor, num_prompt_tokens: int, group_size: int = 1) -> None:
        """`numbers`: (B, tokens of an answer), of `uniforms`; `group_size` answers in turn have the same prompt."""
        self.numbers, self.num_prompt_tokens, self.group_size = numbers, num_prompt_tokens, group_size

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
        """The sampling loop of transformers, for `generate(custom_generate=...)`: there temperature and the like are
        already in the list, which they are not yet where a processor is given to `generate`. One token is left, so the
        largest is taken, and nothing is drawn from the distribution once more.
        """
        takes_largest = copy(generation_config)
        takes_largest.do_sample = False
        processors = LogitsProcessorList([*logits_processor, self])
        with prompts_read_once(model, self.group_size):
            return model._sample(input_ids, logits_processor=processors, generation_config=takes_largest, **options)


def group_size(prompts: Sequence[Sequence[int]]) -> int:
    """How many neighbors are equal, if it is the same number everywhere; else 1."""
    starts = [0, *(place for place, (a, b) in enumerate(pairwise(prompts), 1) if a != b), len(prompts)]
    sizes = {end - start for start, end in pairwise(starts)}
    return sizes.pop() if len(sizes) == 1 else 1


@contextmanager
def prompts_read_once(model: Any, group_size: int) -> Iterator[None]:
    """Inside, `model` reads each prompt of B // group_size once and copies its keys and values for all its answers.

    Where the state of the model is more than keys and values, or none is kept, each row is read by itself as ever.
    """
    if group_size == 1:
        yield
        return
    read = model._prefill

    def prefill(input_ids: Tensor, generation_config: GenerationConfig, given: dict[str, Any], **options: Any) -> Any:
        cache = next((given[name] for name in CACHE_NAMES if given.get(name) is not None), None)
        if not _can_be_shared(cache, given):
            return read(input_ids, generation_config, given, **options)
        own = {name: value[::group_size] if isinstance(value, Tensor) else value for name, value in given.items()}
        output = read(input_ids[::group_size], generation_config, own, **options)
        assert cache is not None
        cache.batch_repeat_interleave(group_size)
        output.logits = output.logits.repeat_interleave(group_size, dim=0)
        return output

    model._prefill = prefill
    try:
        yield
    finally:
        del model._prefill


def _can_be_shared(cache: Any, given: dict[str, Any]) -> bool:
    layers = getattr(cache, "layers", None) or [None]
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers) and all(
        name in BY_ROW and value.dim() == 2 for name, value in tensors.items()
    )
