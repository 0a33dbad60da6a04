"""Llama 4 with its vision part can be called.

If the test of plain transformers fails, the library has been mended, and `luthier.model.compat.llama4_outputs` can go.
"""

import pytest
import torch
import transformers
from transformers import Llama4Config, Llama4ForConditionalGeneration
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from luthier.model.compat.llama4_outputs import give_image_outputs
from tests.media_models import TEXT, VISION


@pytest.fixture
def model(monkeypatch):
    monkeypatch.delattr(MoeCausalLMOutputWithPast, "image_outputs", raising=False)
    text = {**TEXT, "intermediate_size_mlp": 96, "num_local_experts": 2}
    vision = {**VISION, "intermediate_size": 128, "projector_input_dim": 64, "projector_output_dim": 64}
    return Llama4ForConditionalGeneration(
        Llama4Config(text_config=text, vision_config={**vision, "vision_output_dim": 64})
    )


def test_it_returns_logits(model):
    give_image_outputs(model)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 320)


@pytest.mark.skipif(transformers.__version__ < "5.24", reason="an earlier version has no such fault")
def test_plain_transformers_fails(model):
    with pytest.raises(AttributeError, match="image_outputs"):
        model(input_ids=torch.tensor([[1, 2, 3]]))
