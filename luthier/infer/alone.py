"""Answers one at a time, through `generate()`: for beam search, prompts with images, and models whose rows cannot share
a batch.

These are models whose state is more than keys and values (Mamba, linear attention), encoder-decoders, models with
routers between their blocks, and any model without a cache. The tokens are still chosen by the row itself.
"""

from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from luthier.core.errors import InvalidInput
from luthier.infer.decoding import generation_config
from luthier.infer.grammar import Grammars
from luthier.infer.row import Chooser, Row
from luthier.infer.types import Settings, Token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_beams(settings: Settings) -> None:
    """Raises `InvalidInput` for settings of single tokens beside beam search, which compares whole answers."""
    single = {
        "a grammar": settings.grammar is not None,
        "log-probabilities": settings.num_logprobs is not None,
        "logit_bias": bool(settings.logit_bias),
        "a presence or frequency penalty": bool(settings.presence_penalty or settings.frequency_penalty),
    }
    found = [name for name, is_set in single.items() if is_set]
    if settings.num_beams > 1 and found:
        raise InvalidInput(f"num_beams: {settings.num_beams} does not go with {found[0]} -> set num_beams: 1")


class _RowChooses(LogitsProcessor):
    """Lets a row choose from the raw logits, and leaves its token as the only possible one."""

    def __init__(self, row: Row) -> None:
        self.row, self.has_ended = row, False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.has_ended = self.row.take(scores[0])
        return torch.full_like(scores, -torch.inf).index_fill_(-1, input_ids.new_tensor(self.row.last_id), 0.0)


def _ends_if(is_over: Callable[[], bool]) -> Any:
    """A stopping criterion for all sequences alike."""
    return lambda ids, scores, **_: torch.full((len(ids),), is_over(), device=ids.device)


def answer_alone(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", grammars: Grammars, row: Row, *, use_cache: bool
) -> None:
    """Generate the whole answer of a row. Raises what `generate` raises."""
    if row.num_new_tokens <= 0 or row.settings.prompt_logprobs:
        raise InvalidInput("this model does not score prompts: it answers one prompt at a time")
    config = generation_config(
        row.settings,
        model=model,
        num_prompt_tokens=len(row.prompt_ids),
        num_new_tokens=row.num_new_tokens,
        stop_ids=row.stop_ids,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=use_cache,
    )
    input_ids = torch.tensor([row.prompt_ids], device=model.device)
    generate: Any = model.generate
    given = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "generation_config": config}
    if row.seen is not None:
        given |= {name: values.to(model.device) for name, values in row.seen().items()}
    if row.settings.num_beams > 1:
        if row.settings.seed is not None:
            torch.manual_seed(row.settings.seed)
        output = generate(**given, stopping_criteria=StoppingCriteriaList([_ends_if(lambda: row.is_canceled)]))
        for token_id in output[0, len(row.prompt_ids) :].tolist():
            if row.push(Token(token_id)):
                return
        row.end()  # the beams ended before the limit, without a stop token
        return

    def sample(
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList,
        **options: Any,
    ) -> Any:
        matcher = None
        if row.settings.grammar is not None:
            matcher = grammars.matcher(row.settings.grammar, model.get_output_embeddings().weight.shape[0])
        row.chooser = Chooser(row.prompt_ids, row.settings, logits_processor, matcher)
        chooses = _RowChooses(row)
        takes_largest = copy(generation_config)
        takes_largest.do_sample = False
        stopping_criteria.append(_ends_if(lambda: chooses.has_ended or row.is_canceled))
        return model._sample(
            input_ids,
            logits_processor=LogitsProcessorList([chooses]),
            generation_config=takes_largest,
            stopping_criteria=stopping_criteria,
            **options,
        )

    with torch.no_grad():
        generate(**given, custom_generate=sample)
