"""A model whose attention kernel needs a GPU can be inspected before it is there."""

import pytest
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from luthier.model.attention_kernels import can_be_tried
from luthier.model.heads.output_head import inspect_head
from tests.tiny import TINY_LLAMA


def test_the_head_of_a_model_is_found_without_its_attention_kernel(monkeypatch):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY_LLAMA))
    model.set_attn_implementation("flex_attention")
    kernels = AttentionInterface._global_mapping
    monkeypatch.setitem(kernels, "flex_attention", lambda *a, **k: pytest.fail("it ran"))
    assert not can_be_tried(model)
    assert inspect_head(model).linear is model.lm_head
    assert model.config._attn_implementation == "flex_attention"
