"""The logits processors of answers, as transformers puts them together."""

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from luthier.core.errors import ModelError
from luthier.infer.decoding import generation_config
from luthier.model.files.readable import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from luthier.infer.row import Row

_SHARED = (
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinPLogitsWarper,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
)
"""Those that know nothing of the length of a prompt, and remember nothing of an answer."""
_MAX_KEPT = 64
"""Requests to a server may each have settings of their own."""


class Processors:
    """Builds them once for answers with the same settings, since that takes longer than to choose a token."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        self._model, self._tokenizer = model, tokenizer
        self._kept: dict[Hashable, LogitsProcessorList] = {}

    def of(self, row: "Row") -> LogitsProcessorList:
        """What the settings of a row and the model's generation_config.json do to logits."""
        key = _key(row)
        found = self._kept.get(key)
        if found is None:
            found = self._build(row)
            if all(type(one) in _SHARED for one in found):
                if len(self._kept) == _MAX_KEPT:
                    self._kept.clear()
                self._kept[key] = found
        return found

    def _build(self, row: "Row") -> LogitsProcessorList:
        """`generate` puts them together; it is stopped before it generates."""
        config = generation_config(
            row.settings,
            model=self._model,
            num_prompt_tokens=len(row.prompt_ids),
            num_new_tokens=max(row.num_new_tokens, 1),
            stop_ids=row.stop_ids,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        found: list[LogitsProcessorList] = []

        def note(model: Any, input_ids: Tensor, *, logits_processor: LogitsProcessorList, **_: Any) -> Tensor:
            found.append(logits_processor)
            return input_ids

        generate: Any = self._model.generate
        ids = torch.tensor([row.prompt_ids], device=self._model.device)
        try:
            generate(ids, attention_mask=torch.ones_like(ids), generation_config=config, custom_generate=note)
        except (ValueError, TypeError) as fault:
            raise ModelError(
                f"{self._model.name_or_path}: its generation_config.json cannot be used ({first_line(fault)})"
                " -> correct it, or remove it to generate with default settings"
            ) from fault
        return found[0]


def _key(row: "Row") -> Hashable:
    """What `generation_config` makes of a row, but for the limits of its length."""
    settings = row.settings
    choice = (settings.temperature, settings.top_p, settings.top_k, settings.min_p)
    beams = (settings.num_beams, settings.length_penalty)
    return row.stop_ids, settings.is_greedy, choice, beams, settings.repetition_penalty
