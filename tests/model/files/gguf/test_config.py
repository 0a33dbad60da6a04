"""What a GGUF header says and transformers does not read."""

from pathlib import Path

import pytest
import transformers

from luthier.model.files.gguf.config import repair_config
from luthier.model.files.gguf.header import GgufHeader, GgufTensor


def header(architecture: str, *tensors: str, **keys) -> GgufHeader:
    own = {f"{architecture}.{name.replace('__', '.')}": value for name, value in keys.items()}
    return GgufHeader(Path("m.gguf"), architecture, tuple(GgufTensor(name, 1, 0, 0) for name in tensors), 0, own)


@pytest.mark.parametrize(
    ("architecture", "kind", "num_layers", "scale"),
    [
        ("gemma2", "Gemma2Config", 42, 16),
        ("gemma2", "Gemma2Config", 46, 64 // 8),
        ("gemma3", "Gemma3TextConfig", 48, 16),
        ("gemma3", "Gemma3TextConfig", 62, 64 // 8),
    ],
)
def test_of_the_gemmas_those_of_27b_scale_queries_by_hidden_size_over_heads(architecture, kind, num_layers, scale):
    config = getattr(transformers, kind)(hidden_size=64, num_attention_heads=8, num_hidden_layers=num_layers)
    repair_config(config, header(architecture, attention__key_length=16, attn_logit_softcapping=30.0))
    assert config.head_dim == 16
    assert config.query_pre_attn_scalar == scale
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (30.0, None)


def test_biases_of_queries_are_told_from_their_tensor():
    for tensors, expected in (((), False), (("blk.0.attn_q.bias",), True), (("blk.0.attn_output.weight",), False)):
        config = transformers.LlamaConfig(hidden_size=64, num_attention_heads=8)
        repair_config(config, header("llama", *tensors))
        assert config.attention_bias is expected


@pytest.mark.parametrize("original", [None, 2048])
def test_a_linear_or_yarn_stretch_is_put_into_the_parameters(original):
    for kind in ("linear", "yarn"):
        config = transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
        given = {"rope__scaling__type": kind, "rope__scaling__factor": 4.0}
        given |= {} if original is None else {"rope__scaling__original_context_length": original}
        repair_config(config, header("llama", **given))
        expected = {"rope_type": kind, "rope_theta": 5e5, "factor": 4.0}
        expected |= {} if original is None else {"original_max_position_embeddings": original}
        assert config.rope_parameters == expected
