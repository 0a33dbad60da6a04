"""Which models can be split over processes; tests/runs/test_tensor_parallel.py trains with them."""

import pytest
from transformers import AutoConfig

from luthier.core.errors import ModelError
from luthier.model.files.sources import ModelFiles
from luthier.model.tensor_parallel import split_layers


@pytest.mark.parametrize(
    ("kind", "changes", "tp_size", "message"),
    [
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}, 3, "4 attention heads .* set tp_size to 2"),
        (
            "llama",
            {"num_attention_heads": 4, "num_key_value_heads": 1},
            2,
            "1 key and value heads .* leave tp_size out",
        ),
        ("gpt2", {}, 2, "transformers has no plan for gpt2"),
        ("gemma3", {}, 2, "it reads more than text"),
        ("llama", {"quantization_config": {"quant_method": "gptq"}}, 2, "its weights are quantized"),
    ],
)
def test_models_that_cannot_be_split(kind, changes, tp_size, message):
    with pytest.raises(
        ModelError, match=rf"tp_size: the layers of somewhere cannot .* {tp_size} processes: .*{message}"
    ):
        split_layers(ModelFiles("somewhere"), AutoConfig.for_model(kind, **changes), tp_size)


def test_gguf_files_are_read_as_a_whole():
    files = ModelFiles("somewhere", gguf_file="model.gguf")
    with pytest.raises(ModelError, match="GGUF file is read as a whole -> write the model with"):
        split_layers(files, AutoConfig.for_model("llama"), 2)


def test_each_process_reads_its_part():
    options = split_layers(ModelFiles("somewhere"), AutoConfig.for_model("llama"), 4)
    assert options["distributed_config"].tp_size == 4 and options["distributed_config"].dp_size == 1
    assert split_layers(ModelFiles("somewhere"), AutoConfig.for_model("gpt2"), 1) == {}
