"""What the weights of a model take, read off its files, is what they take once they are loaded."""

import dataclasses

import pytest
import torch

from luthier.config.load import load_infer, load_train
from luthier.core.errors import ModelError
from luthier.core.machine import detect
from luthier.model.backends import load_for_inference
from luthier.model.files.hubs import HubAccess
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from luthier.model.loading.memory_check import is_out_of_memory, placement, weight_bytes
from luthier.model.save import num_bytes
from tests.hub_cache import put_into_cache
from tests.tiny import tiny_llama
from tests.workflow.test_export import adapter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder(llama_folder, dtype):
    expected = num_bytes(load_model(ModelSource(str(llama_folder)), dtype=dtype))
    assert weight_bytes(ModelSource(str(llama_folder)), dtype.itemsize) == expected


def test_a_gguf_file_is_dequantized(smollm2_folder):
    assert weight_bytes(ModelSource(str(smollm2_folder)), 2) == 2 * 134_515_008


def test_integers_keep_their_width(llama_folder, tmp_path):
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_bytes((llama_folder / "config.json").read_bytes())
    save_file({"packed": torch.zeros(10, dtype=torch.uint8), "half": torch.zeros(10)}, tmp_path / "model.safetensors")
    assert weight_bytes(ModelSource(str(tmp_path)), 2) == 10 + 20


def test_the_hub_does_not_tell_and_its_cache_does(llama_folder, tmp_path):
    assert weight_bytes(ModelSource("someone/something"), 4) == 0
    put_into_cache(llama_folder, "someone/llama", tmp_path)
    in_cache = ModelSource("someone/llama", HubAccess(cache_dir=str(tmp_path)))
    assert weight_bytes(in_cache, 4) == weight_bytes(ModelSource(str(llama_folder)), 4) > 0


@pytest.fixture(scope="module")
def four_layers(tmp_path_factory):
    """A model of 1.1 MB."""
    return tiny_llama(tmp_path_factory.mktemp("four"), num_hidden_layers=4)


@pytest.fixture
def small_memory(monkeypatch):
    monkeypatch.setattr("luthier.model.loading.memory_check.available_memory_bytes", lambda: 500_000)


def asked(folder, **keys):
    run = load_infer({"model_name_or_path": str(folder), "template": "chatml", "infer_dtype": "float32", **keys})
    with torch.no_grad():
        model = load_for_inference(run, dataclasses.replace(detect(), num_accelerators=0, device="cpu"))
        return model, model(torch.arange(9)[None]).logits


def test_what_does_not_fit_is_read_from_disk_and_computes_the_same(
    four_layers, small_memory, monkeypatch, tmp_path, said
):
    keys = {"offload_folder": str(tmp_path / "offload")}
    model, logits = asked(four_layers, **keys)
    assert "disk" in set(model.hf_device_map.values()) and "cpu" in set(model.hf_device_map.values())
    assert any("a part of them is read from disk" in line for line in said)
    words = model.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False)
    monkeypatch.setattr("luthier.model.loading.memory_check.available_memory_bytes", lambda: 500_000_000)
    whole, expected = asked(four_layers, **keys)
    assert not hasattr(whole, "hf_device_map")
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(words, whole.generate(torch.arange(5)[None], max_new_tokens=3, do_sample=False))


def test_an_adapter_is_not_lost_on_disk(four_layers, small_memory, tmp_path):
    keys = {"offload_folder": str(tmp_path), "finetuning_type": "lora"}
    with pytest.raises(ModelError, match=r"did not fit into memory and is on disk.* -> merge the adapter"):
        asked(four_layers, **keys, adapter_name_or_path=str(adapter(four_layers, tmp_path / "lora")))


def test_it_is_asked_for_by_the_key(four_layers, small_memory):
    with pytest.raises(ModelError, match="are free -> load it in 16 bits"):
        asked(four_layers)


def test_trainable_weights_stay_in_memory(four_layers, small_memory):
    with pytest.raises(ModelError, match="are free -> load it in 16 bits"):
        load_model(ModelSource(str(four_layers)), dtype=torch.float32)
    run = load_train({"model_name_or_path": "x", "dataset": "x", "output_dir": "x", "offload_folder": "there"})
    assert any("trainable weights stay in memory" in warning.reason for warning in run.warnings)


def test_several_devices_take_what_they_can(llama_folder):
    source = ModelSource(str(llama_folder))
    assert placement(source, torch.float32, "auto", "there", is_low_bit=False) == {
        "device_map": "auto",
        "offload_folder": "there",
    }
    assert placement(source, torch.float32, None, "there", is_low_bit=True) == {}


@pytest.mark.parametrize(
    ("fault", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_memory_that_cuda_or_its_libraries_refuse_is_recognized(fault, is_memory):
    assert is_out_of_memory(fault) is is_memory
