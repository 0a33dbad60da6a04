"""Logits processors are built once for equal settings, and apart where an answer needs its own."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import (
    MinLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
)

from luthier.infer.processors import Processors
from luthier.infer.row import new_row
from luthier.infer.types import Settings
from tests.tiny import TINY_LLAMA, byte_tokenizer

TOKENIZER = byte_tokenizer()


def llama(**generation):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)).eval()
    model.generation_config.update(**generation)
    return model


def row(prompt_ids=(1, 2), stop_ids=(260,), **settings):
    return new_row(
        prompt_ids,
        Settings(**{"max_new_tokens": 4} | settings),
        num_positions=64,
        stop_ids=stop_ids,
        tokenizer=TOKENIZER,
        deliver=lambda item: None,
    )


def test_answers_with_the_same_settings_share_them_whatever_their_prompts_seeds_and_lengths():
    processors = Processors(llama(), TOKENIZER)
    first = processors.of(row(repetition_penalty=1.2))
    assert processors.of(row([5] * 9, repetition_penalty=1.2, seed=7, max_new_tokens=9, logit_bias={3: 1.0})) is first
    assert [type(one) for one in first][:2] == [RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper]


def test_every_setting_that_they_depend_on_makes_others():
    processors = Processors(llama(no_repeat_ngram_size=3), TOKENIZER)
    changes = (
        {"temperature": 0.5},
        {"top_p": 0.5},
        {"top_k": 3},
        {"min_p": 0.1},
        {"repetition_penalty": 1.3},
        {"do_sample": False},
        {"stop_ids": (260, 5)},
    )
    found = [processors.of(row())] + [processors.of(row(**change)) for change in changes]
    assert len({id(one) for one in found}) == len(found)
    for change, built in zip(({}, *changes), found, strict=True):
        alone = Processors(llama(no_repeat_ngram_size=3), TOKENIZER).of(row(**change))
        scores, ids = torch.randn(1, 320), torch.tensor([[1, 2, 1, 2]])
        assert torch.equal(built(ids, scores.clone()), alone(ids, scores.clone()))


def test_those_that_know_the_length_of_a_prompt_are_built_for_each():
    processors = Processors(llama(min_length=9), TOKENIZER)
    one, other = (processors.of(row(prompt)) for prompt in ([1], [1, 2, 3]))
    assert one is not other and any(isinstance(each, MinLengthLogitsProcessor) for each in one)


def test_no_more_than_some_are_kept():
    processors = Processors(llama(), TOKENIZER)
    first = processors.of(row())
    for number in range(64):
        processors.of(row(temperature=0.1 + number / 100))
    assert processors.of(row()) is not first
