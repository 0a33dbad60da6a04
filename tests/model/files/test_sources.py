"""Where a model comes from, and every way in which it can be missing or damaged: one sentence with a remedy."""

import json
import struct
import subprocess
import sys

import pytest

from luthier.core.errors import ModelError
from luthier.model.files.gguf.header import check_loadable, read_header
from luthier.model.files.hubs import HubAccess
from luthier.model.files.sources import (
    ModelFiles,
    ModelSource,
    check_adapter_source,
    check_source,
    read_safetensors_header,
)
from luthier.model.loading.config import load_config
from luthier.model.loading.load import load_model
from luthier.model.tokenizer import load_tokenizer
from tests.hub_cache import put_into_cache
from tests.tiny import tiny_llama


def write_gguf(path, architecture="llama", cut=0):
    """A GGUF file of one 4 x 8 float32 tensor."""
    import numpy
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_tensor("token_embd.weight", numpy.ones((4, 8), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    return path


def refused(action, *args, **kwargs) -> str:
    """What `action` says of a model that it cannot use; the name of the model is the first argument."""
    if action in (check_source, load_config, load_tokenizer, load_model):
        args = (ModelSource(str(args[0])), *args[1:])
    with pytest.raises(ModelError) as caught:
        action(*args, **kwargs)
    return str(caught.value)


def test_a_folder_a_gguf_file_and_a_hub_id_are_told_apart(tmp_path, llama_folder):
    path = write_gguf(tmp_path / "tiny.gguf")
    assert ModelSource(str(llama_folder)).files == ModelFiles(str(llama_folder))
    assert ModelSource(str(path)).files == ModelSource(str(tmp_path)).files == ModelFiles(str(tmp_path), "tiny.gguf")
    assert ModelSource("meta-llama/Llama-2-7b-hf").files == ModelFiles("meta-llama/Llama-2-7b-hf", is_local=False)
    assert ModelSource("gpt2").files == ModelFiles("gpt2", is_local=False)


def test_a_missing_path_says_how_far_it_exists(tmp_path):
    words = refused(check_source, str(tmp_path / "no" / "model"))
    assert "no such model file or folder" in words
    assert str(tmp_path) in words


def test_a_folder_without_a_model_is_named(tmp_path):
    assert "holds no model" in refused(check_source, str(tmp_path))
    tiny_llama(tmp_path / "inner")
    assert "did you mean its folder inner?" in refused(check_source, str(tmp_path))


def test_an_adapter_is_not_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert "this is an adapter" in refused(check_source, str(tmp_path))


def test_several_gguf_files_need_a_choice(tmp_path):
    write_gguf(tmp_path / "a.gguf"), write_gguf(tmp_path / "b.gguf")
    assert "a.gguf, b.gguf" in refused(check_source, str(tmp_path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "should hold a JSON object"),
        ("config.json", "{}", "names no model_type"),
        ("model.safetensors", "", "not a whole safetensors file"),
        ("model.safetensors", "x" * 100, "not a whole safetensors file"),
        ("model.safetensors", None, "weights are missing"),
    ],
)
def test_damaged_files_of_a_folder_are_named(tmp_path, name, content, words):
    folder = tiny_llama(tmp_path / "model")
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    message = refused(check_source, str(folder))
    assert words in message
    assert str(folder) in message


def test_a_cut_off_safetensors_file_is_told_by_its_size(tmp_path):
    folder = tiny_llama(tmp_path / "model")
    weights = folder / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[: size - 1000])
    for action in (check_source, lambda name: load_model(ModelSource(name), dtype=None)):
        assert f"{size - 1000:,} bytes instead of {size:,}" in refused(action, str(folder))


def test_a_missing_shard_is_named(tmp_path):
    folder = tiny_llama(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(shards))
    assert "1 of 2 weight files are missing: model-00002" in refused(check_source, str(folder))


def test_shards_may_lie_in_a_folder_inside_and_nowhere_else(tmp_path):
    folder = tiny_llama(tmp_path / "model")
    (folder / "parts").mkdir()
    whole = folder / "model.safetensors"
    names = [name for name in read_safetensors_header(whole) if name != "__metadata__"]
    whole.rename(folder / "parts" / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    for place in ("parts/a.safetensors", "./parts/a.safetensors"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, place)}))
        check_source(ModelSource(str(folder)))
    for place in (str(folder / "parts" / "a.safetensors"), "../model/parts/a.safetensors", "\0"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, place)}))
        assert "which is not in this folder" in refused(check_source, str(folder))


def test_weights_of_another_model_are_refused(tmp_path):
    import torch

    folder = tiny_llama(tmp_path / "model")
    for changes, words in (({"num_hidden_layers": 3}, "are not in its files"), ({"hidden_size": 128}, "other shapes")):
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))
        assert words in refused(load_model, str(folder), dtype=torch.float32)


def test_an_unknown_architecture_is_refused(tmp_path):
    folder = tiny_llama(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps({"model_type": "llamma"}))
    assert "llamma" in refused(load_config, str(folder))


@pytest.mark.parametrize("action", [check_source, load_config, load_tokenizer, check_adapter_source])
@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_that_cannot_be_reached_is_told_at_once_with_a_remedy(monkeypatch, action, offline):
    def no_address(*args):
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setattr("socket.getaddrinfo", no_address)
    message = refused(action, "nobody/no-such-model")
    assert "no folder of this name here" in message
    assert "give the path of a folder" in message
    assert ("HF_HUB_OFFLINE is set" if offline else "Name or service not known") in message


def test_a_hub_id_in_the_cache_needs_no_network(tmp_path, monkeypatch):
    (tmp_path / "models--org--name").mkdir()
    monkeypatch.setattr("socket.getaddrinfo", lambda *args: pytest.fail("the network was asked"))
    check_source(ModelSource("org/name", HubAccess(cache_dir=str(tmp_path))))


@pytest.mark.parametrize("has_weights", [True, False])
def test_what_the_cache_has_of_a_hub_id_is_read_as_a_folder(tmp_path, monkeypatch, llama_folder, has_weights):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    snapshot = put_into_cache(
        llama_folder, "org/name", tmp_path, which=lambda file: has_weights or file.suffix != ".safetensors"
    )
    source, local = ModelSource("org/name", HubAccess(cache_dir=str(tmp_path))), ModelSource(str(llama_folder))
    assert source.folder == snapshot and source.config == local.config
    assert source.has_weights_here is has_weights and local.has_weights_here
    if has_weights:
        assert source.headers == local.headers
    with pytest.raises(ModelError, match="someone/else: there is no folder of this name here"):
        assert ModelSource("someone/else", HubAccess(cache_dir=str(tmp_path))).config
    (tmp_path / "models--org--empty").mkdir()
    with pytest.raises(ModelError, match="org/empty: there is no folder of this name here, and its config cannot be"):
        assert ModelSource("org/empty", HubAccess(cache_dir=str(tmp_path))).config


def test_a_gguf_header_says_what_is_in_the_file(tmp_path):
    header = read_header(write_gguf(tmp_path / "tiny.gguf"))
    assert header.architecture == "llama"
    assert [(tensor.name, tensor.num_elements) for tensor in header.tensors] == [("token_embd.weight", 32)]


@pytest.mark.parametrize("damage", ["head", "middle", "tensor", "empty", "other"])
def test_a_damaged_gguf_file_is_refused(tmp_path, damage):
    path = write_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes()
    path.write_bytes(
        {
            "head": b"XXXX" + data[4:],
            "middle": data[:100],
            "tensor": data[:-200],
            "empty": b"",
            "other": data[:4] + struct.pack("<I", 99) + data[8:],
        }[damage]
    )
    assert "not a whole GGUF file" in refused(check_source, str(path))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.alignment", 0, "aligned to 0 bytes"),
        ("general.alignment", "x", "aligned to 'x' bytes"),
        ("llama.block_count", 1 << 31, "2147483648 blocks of 1 tensors"),
        ("llama.block_count", 2.5, "2.5 blocks of 1 tensors"),
    ],
)
def test_a_gguf_header_with_an_odd_value_is_refused(tmp_path, key, value, words):
    path = write_gguf(tmp_path / "tiny.gguf")
    data = path.read_bytes().replace(b"llama.block_count", b"llama.block_other")
    text = struct.pack("<Q", len(key)) + key.encode()
    packed = {
        int: lambda: struct.pack("<IQ", 10, value),
        float: lambda: struct.pack("<Id", 12, value),
        str: lambda: struct.pack("<IQ", 8, len(value)) + value.encode(),
    }[type(value)]()
    (num_keys,) = struct.unpack("<Q", data[16:24])
    path.write_bytes(data[:16] + struct.pack("<Q", num_keys + 1) + text + packed + data[24:])
    message = refused(check_source, str(path))
    assert "not a whole GGUF file" in message
    assert words in message


def test_a_gguf_file_cut_inside_its_last_tensor_is_refused(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", cut=8)
    for action in (check_loadable, lambda p: load_tokenizer(ModelSource(str(p)))):
        assert "token_embd.weight" in refused(action, path)


def test_a_gguf_file_of_an_architecture_that_cannot_be_loaded_names_those_that_can(tmp_path):
    path = write_gguf(tmp_path / "tiny.gguf", architecture="rwkv7")
    for action in (load_tokenizer, load_config, lambda name: load_model(ModelSource(name), dtype=None)):
        message = refused(action, str(path))
        assert "'rwkv7'" in message
        assert "llama, " in message
        assert "safetensors" in message


@pytest.mark.parametrize("architecture", ["qwen2moe", "gpt-oss", "llama"])
def test_spellings_of_an_architecture_are_one(tmp_path, architecture):
    assert check_loadable(write_gguf(tmp_path / "tiny.gguf", architecture)).architecture == architecture


def test_adapter_folders_are_looked_at(tmp_path):
    assert "no such adapter folder" in refused(check_adapter_source, str(tmp_path / "none" / "here"))
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "adapter_config.json").write_text("{}")
    assert "did you mean its folder checkpoint-5?" in refused(check_adapter_source, str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert "it holds a whole model: name it as the model" in refused(check_adapter_source, str(tmp_path))


def test_looking_at_a_model_imports_neither_torch_nor_transformers(llama_folder):
    code = f"""
import sys
from luthier.model.files.sources import ModelSource, check_source
check_source(ModelSource({str(llama_folder)!r}))
assert not {{"torch", "transformers", "numpy", "gguf"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_that_may_not_be_read_is_one_sentence(llama_folder, monkeypatch):
    """Tests may run as root, who reads everything."""

    def forbidden(path, **words):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("pathlib.Path.read_text", forbidden)
    message = refused(check_source, str(llama_folder))
    assert "config.json: cannot be read (Permission denied) -> ask its owner" in message
    with pytest.raises(ModelError, match="cannot be read"):
        assert ModelSource(str(llama_folder)).config
