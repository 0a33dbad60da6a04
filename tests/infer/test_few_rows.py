"""The head of a model whose products are filled up: the same logits for every number of rows."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from luthier.infer.few_rows import FEWEST, FULL, MIN_VOCABULARY, fill_head
from tests.tiny import tiny_llama


@pytest.fixture
def model(tmp_path):
    return AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path, vocab_size=MIN_VOCABULARY))


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (FEWEST, 1), (8, 1), (2, 5), (FULL - 1, 1), (FULL, 1), (3, 40)])
def test_the_logits_are_the_same(model, shape, monkeypatch):
    head = model.get_output_embeddings()
    states = torch.randn(*shape, head.in_features)
    expected = head(states)
    fill_head(model)
    seen = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda x, *rest: seen.append(x.shape[:-1].numel()) or linear(x, *rest))
    assert torch.allclose(head(states), expected, atol=1e-6)
    num_rows = shape[0] * shape[1]
    assert seen == [FULL if FEWEST <= num_rows < FULL else num_rows]


def test_others_stay_as_they_are(model, tmp_path):
    small = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "small"))
    for other in (small, model.to(torch.bfloat16)):
        fill_head(other)
        assert "forward" not in vars(other.get_output_embeddings())
