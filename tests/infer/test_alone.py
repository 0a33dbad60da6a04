"""Answers through `generate()`: the settings of a row mean the same as in a batch."""

import pytest
import torch

from luthier.core.errors import InvalidInput
from luthier.infer.alone import _ends_if, _RowChooses
from luthier.infer.engines.huggingface import HuggingFaceModel
from luthier.infer.grammar import json_grammar
from luthier.infer.types import Settings
from tests.tiny import TINY_LLAMA, byte_tokenizer
from tests.waiting import until

SCHEMA = {"enum": ["yes", "no"]}


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)).eval()


def answer(llama, settings, *, alone):
    ticket = HuggingFaceModel(llama, byte_tokenizer(), [260], use_kv_cache=not alone).submit([1, 2], settings)
    text = "".join(piece.text for piece in ticket.pieces())
    assert text == ticket.answer.text
    return ticket.answer


@pytest.mark.parametrize(
    "keys",
    [
        {"seed": 3, "do_sample": True},
        {"presence_penalty": 1.5},
        {"repetition_penalty": 1.5},
        {"logit_bias": {7: 5.0}},
        {"num_logprobs": 2},
        {"stop": ("a", "e", "t")},
        {"grammar": "schema"},
    ],
    ids=lambda keys: next(iter(keys)),
)
def test_the_settings_mean_the_same_as_in_a_batch(llama, keys):
    if "grammar" in keys:
        pytest.importorskip("llguidance")
        keys = {"grammar": json_grammar(SCHEMA)}
    settings = Settings(**{"do_sample": False, "max_new_tokens": 12} | keys)
    one, other = (answer(llama, settings, alone=alone) for alone in (True, False))
    assert [token.id for token in one.tokens] == [token.id for token in other.tokens]
    assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
    for mine, theirs in zip(one.tokens, other.tokens, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)


def test_beams_are_those_of_generate(llama):
    given = torch.tensor([[1, 2]])
    expected = llama.generate(
        given, attention_mask=torch.ones_like(given), num_beams=3, do_sample=False, max_new_tokens=8, pad_token_id=256
    )
    found = answer(llama, Settings(do_sample=False, num_beams=3, max_new_tokens=8), alone=False)
    assert [token.id for token in found.tokens] == expected[0, 2:].tolist()


def test_beam_search_refuses_what_concerns_single_tokens(llama):
    with pytest.raises(InvalidInput, match="num_beams: 3 does not go with log-probabilities -> set num_beams: 1"):
        answer(llama, Settings(num_beams=3, num_logprobs=1), alone=False)


def test_a_canceled_answer_ends_at_its_next_token(llama, monkeypatch):
    own, taken = _RowChooses.__call__, []

    def canceled_meanwhile(self, *given):
        taken.append(1)
        self.row.is_canceled = True
        return own(self, *given)

    monkeypatch.setattr(_RowChooses, "__call__", canceled_meanwhile)
    model = HuggingFaceModel(llama, byte_tokenizer(), [260], use_kv_cache=False)
    model.submit([1, 2], Settings(do_sample=False, max_new_tokens=100, ignore_eos=True))
    until(lambda: not model.num_running)
    assert len(taken) == 1


def test_a_prompt_is_not_scored_alone(llama):
    with pytest.raises(InvalidInput, match="does not score prompts"):
        answer(llama, Settings(num_logprobs=1, prompt_logprobs=True, max_new_tokens=2), alone=True)


class _Ends:
    """A row whose answer ends with token 2."""

    last_id, is_canceled = 2, False

    def take(self, scores) -> bool:
        return True


def test_what_chooses_and_ends_lies_on_the_device_of_the_scores():
    """A tensor that names no device would be on `meta` here, as it would be on the CPU beside a model on a GPU."""
    ids, scores = torch.ones(2, 3, dtype=torch.long), torch.zeros(1, 5)
    chooses = _RowChooses(_Ends())
    with torch.device("meta"):
        chosen, ended = chooses(ids, scores), _ends_if(lambda: chooses.has_ended)(ids, scores)
    assert chosen.argmax(-1).tolist() == [2]
    assert ended.tolist() == [True, True]
