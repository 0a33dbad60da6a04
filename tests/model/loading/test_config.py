"""The rows of the embedding, read from config.json alone where that is certain."""

import json

import pytest

from luthier.core.errors import ModelError
from luthier.model.files.sources import ModelSource
from luthier.model.loading.config import embedding_rows, load_config

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
