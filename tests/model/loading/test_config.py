"""The rows of the embedding, read from config.json alone where that is certain."""

import json

import pytest
import torch

from luthier.core.errors import ModelError
from luthier.model.files.sources import ModelSource, check_source
from luthier.model.loading.config import embedding_rows, load_config
from luthier.model.loading.load import load_model
from tests.tiny import TINY_LLAMA

CAUSAL = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
CONFIGS = {
    "a language model": CAUSAL | {"vocab_size": 320},
    "its class knows the number": CAUSAL,
    "of text and images": {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "vocab_size": 7,
        "text_config": {"model_type": "gemma3_text", "vocab_size": 99},
    },
    "the part of the text is left to its class": {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "vocab_size": 7,
    },
    "without architectures": {"model_type": "qwen2", "vocab_size": 11},
}


def source(folder, config) -> ModelSource:
    (folder / "config.json").write_text(json.dumps(config))
    return ModelSource(str(folder))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_rows_are_those_of_the_whole_config(tmp_path, config):
    model = source(tmp_path, config)
    assert embedding_rows(model) == load_config(model).get_text_config().vocab_size


def test_a_type_that_transformers_does_not_know_is_refused(tmp_path):
    with pytest.raises(ModelError, match="update transformers"):
        embedding_rows(
            source(tmp_path, {"model_type": "unheard_of", "vocab_size": 5, "architectures": ["AForCausalLM"]})
        )


ODD = (None, -1, 0, 1.5, "x", "", [], [1], {}, {"a": 1}, True, 10**30, 1e308)


@pytest.mark.parametrize("name", ["architectures", "dtype", "model_type", "head_dim", "num_attention_heads"])
def test_an_odd_value_in_a_config_is_read_or_refused_in_a_sentence(tmp_path, name):
    plain = {**TINY_LLAMA, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float32"}
    for value in ODD:
        model = source(tmp_path, plain | {name: value})
        for look in (check_source, embedding_rows, load_config, lambda one: load_model(one, dtype=torch.float32)):
            try:
                look(model) if look is not check_source else check_source(model, weights=False)
            except ModelError as refused:
                assert str(refused).startswith(str(tmp_path)), value


def test_a_config_of_a_million_brackets_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[" * 1_000_000)
    with pytest.raises(ModelError, match="not valid JSON"):
        embedding_rows(ModelSource(str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 0}, "hidden_size: 0: must be above 0"),
        ({"vocab_size": -1}, "vocab_size: -1: must be above 0"),
        ({"attention_dropout": -1}, "attention_dropout: -1.*: must be from 0 to 1"),
        ({"attention_dropout": 1.5}, "attention_dropout: 1.5: must be from 0 to 1"),
    ],
)
def test_sizes_and_dropout_that_no_model_has_are_refused(tmp_path, changes, words):
    with pytest.raises(ModelError, match=words):
        load_config(source(tmp_path, TINY_LLAMA | {"model_type": "llama"} | changes))
