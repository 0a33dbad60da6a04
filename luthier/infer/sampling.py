"""Sampling that depends on an answer's own random numbers, not on the other answers in its batch.

B answers, V vocabulary. transformers samples a whole batch from one random stream, so another batch size or another
process gives other answers. Here each answer has its own stream, and a token is sampled by inverting the distribution
function: the first v with P(1) + ... + P(v) > u, u uniform in [0, 1).

`chosen_token` chooses for one answer with its own settings. `PerAnswerSampler` samples inside `generate`, where all
answers of a batch have the same settings; answers to the same prompt share its prefill.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from luthier.infer.cache import can_be_shared
from luthier.infer.types import Settings
from luthier.model.classes import CACHE_NAMES

BY_ROW = frozenset({"attention_mask", "position_ids", "token_type_ids"})
"""Tensors with one row per prompt that `generate` passes to the model beside `input_ids`."""


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
    return found.squeeze(-1)


def chosen_token(scores: Tensor, settings: Settings, number: float, min_p: float = 0.0) -> int:
    """The next token of one answer, sampled from the (V,) logits with the uniform `number`.

    `min_p`: that of the settings or of the model. The candidates are those of transformers' temperature, top-k, top-p
    and min-p, in this order. They are cut down before they are sorted, since sorting a vocabulary takes longer than a
    small model.
    """
    values = scores / settings.temperature
    ids: Tensor | None = None
    if 0 < settings.top_k < len(values):
        values, ids = values.topk(settings.top_k)
    if settings.top_p < 1 or min_p > 0:
        if ids is None:
            values, ids = values.sort(descending=True)
        probabilities = values.softmax(-1)
        kept = probabilities.cumsum(-1) - probabilities < settings.top_p
        kept &= probabilities >= min_p * probabilities[0]
        kept[0] = True
        values, ids = values[kept], ids[kept]
    if ids is not None:  # in the order of the vocabulary, so that two nearly equal logits may change places
        ids, order = ids.sort()
        values = values[order]
    place = int(sample_tokens(values[None], torch.tensor([number], dtype=torch.float64, device=values.device)))
    return place if ids is None else int(ids[place])


class PerAnswerSampler(LogitsProcessor):
    """Leaves the sampled token as the only possible one. It must be the last processor of the list."""

    def __init__(self, numbers: Tensor, num_prompt_tokens: int, group_size: int = 1) -> None:
        """`numbers`: (B, tokens of an answer) from `uniforms`; each `group_size` neighbors have the same prompt."""
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
        """The sampling loop of transformers, for `generate(custom_generate=...)`.

        There the list already contains temperature and the like; a processor given to `generate` would come before
        them. Only one token is left, so greedy decoding picks it and nothing is sampled twice.
        """
        takes_largest = copy(generation_config)
        takes_largest.do_sample = False
        processors = LogitsProcessorList([*logits_processor, self])
        with prompts_read_once(model, self.group_size):
            return model._sample(input_ids, logits_processor=processors, generation_config=takes_largest, **options)


def group_size(prompts: Sequence[Sequence[int]]) -> int:
    """The length of the runs of equal neighbors if all runs have the same length; else 1."""
    starts = [0, *(place for place, (a, b) in enumerate(pairwise(prompts), 1) if a != b), len(prompts)]
    sizes = {end - start for start, end in pairwise(starts)}
    return sizes.pop() if len(sizes) == 1 else 1


@contextmanager
def prompts_read_once(model: Any, group_size: int) -> Iterator[None]:
    """A context in which `model` prefills each of the B // group_size prompts once and copies its KV cache.

    If the model's state is more than keys and values, or it keeps none, every row is prefilled as usual.
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
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    return can_be_shared(cache) and all(name in BY_ROW and value.dim() == 2 for name, value in tensors.items())
