"""What the weights of a model take, read off its files, is what they take once they are loaded."""

import pytest
import torch

from luthier.model.load import load_model
from luthier.model.memory_check import weight_bytes
from luthier.model.save import num_bytes
from luthier.model.sources import Source, locate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder(llama_folder, dtype):
    expected = num_bytes(load_model(str(llama_folder), dtype=dtype))
    assert weight_bytes(locate(str(llama_folder)), dtype.itemsize) == expected


def test_a_gguf_file_is_dequantised(smollm2_folder):
    assert weight_bytes(locate(str(smollm2_folder)), 2) == 2 * 134_515_008


def test_integers_keep_their_width(llama_folder, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    save_file({"packed": torch.zeros(10, dtype=torch.uint8), "half": torch.zeros(10)}, tmp_path / "model.safetensors")
    assert weight_bytes(locate(str(tmp_path)), 2) == 10 + 20


def test_the_hub_does_not_tell():
    assert weight_bytes(Source("someone/something", is_local=False), 4) == 0
