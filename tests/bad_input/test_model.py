"""Faults in a model's or an adapter's files: told by name, before data are read where the files alone show it."""

import json
import shutil
import struct

import pytest

from tests.tiny import tiny_llama

TRAINING_KEYS = {
    *(
        "stage",
        "do_train",
        "finetuning_type",
        "max_steps",
        "learning_rate",
        "per_device_train_batch_size",
        "output_dir",
    ),
    *("dataset", "dataset_dir", "cutoff_len", "disable_shuffling", "logging_steps", "save_strategy"),
}


def is_refused_everywhere(person, **keys) -> str:
    """By `train`, `chat` and `export` alike; gives what `train` says."""
    said = person.is_refused(**keys)
    path = person.run_file(drop=TRAINING_KEYS - keys.keys(), **keys)
    for words in (("chat", path, "--once", "hi"), ("export", path, f"export_dir={person.folder / 'merged'}")):
        other = person.is_refused_words(*words)
        assert other.splitlines()[-1].split(": ", 1)[1] == said.splitlines()[-1].split(": ", 1)[1]
    return said


def test_missing_model(person):
    missing = person.folder / "no model"
    said = is_refused_everywhere(person, model_name_or_path=str(missing))
    assert f"'{missing}': there is no such model file or folder (it exists up to {person.folder})" in said


def test_missing_model_of_the_hub(person):
    said = person.is_refused(model_name_or_path="nobody/nothing")
    assert "nobody/nothing: there is no folder of this name here" in said
    assert "give the path of a folder or a .gguf file" in said


def test_folder_without_a_model(person, model):
    (model / "config.json").unlink()
    said = is_refused_everywhere(person, model_name_or_path=str(model))
    assert "holds no model: neither config.json nor a .gguf file" in said


def test_torn_weights(person, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    said = is_refused_everywhere(person, model_name_or_path=str(model))
    assert "model.safetensors: this file is cut off or damaged: 461,176 bytes instead of 462,176" in said
    file.write_bytes(file.read_bytes()[:100])
    said = is_refused_everywhere(person, model_name_or_path=str(model))
    assert "this is not a whole safetensors file" in said


def test_missing_weights_and_missing_shard(person, model):
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    said = is_refused_everywhere(person, model_name_or_path=str(model))
    assert "the weights are missing" in said
    names = sorted(weights)
    shards = {name: f"model-0000{1 + (i > 8)}-of-00002.safetensors" for i, name in enumerate(names)}
    save_file({name: weights[name] for name in names[:9]}, model / shards[names[0]])
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    said = is_refused_everywhere(person, model_name_or_path=str(model))
    assert "1 of 2 weight files are missing: model-00002-of-00002.safetensors" in said


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "config.json: this is not valid JSON"),
        ('{"model_type": "lla', "config.json: this is not valid JSON"),
        ("{}", "config.json: this config names no model_type"),
        ('{"model_type": "gpt17"}', "model type `gpt17`"),
    ],
)
def test_broken_config(person, model, text, reason):
    (model / "config.json").write_text(text)
    assert reason in person.is_refused(model_name_or_path=str(model))


def test_missing_tokenizer(person, model):
    for file in model.glob("*token*"):
        file.unlink()
    said = is_refused_everywhere(person, model_name_or_path=str(model))
    assert "the tokenizer is missing: there is no tokenizer.json" in said
    assert "copy the tokenizer's files" in said


def test_torn_tokenizer(person, model):
    file = model / "tokenizer.json"
    file.write_text(file.read_text()[:500])
    assert "its tokenizer cannot be loaded (" in person.is_refused(model_name_or_path=str(model))


def gguf(path, architecture: str) -> str:
    def text(words: str) -> bytes:
        return struct.pack("<Q", len(words)) + words.encode()

    key = text("general.architecture") + struct.pack("<I", 8) + text(architecture)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key)
    return str(path)


def test_gguf_of_an_unsupported_architecture(person):
    file = gguf(person.folder / "strange.gguf", "quen2")
    said = is_refused_everywhere(person, model_name_or_path=file)
    assert "strange.gguf: GGUF files of the architecture 'quen2' cannot be loaded (the nearest is qwen2)" in said
    assert "use the model's safetensors folder or hub id instead" in said


@pytest.mark.parametrize("content", [b"", b"hello", b"GGUF\x03\x00\x00\x00"])
def test_gguf_that_is_none_or_torn(person, content):
    file = person.folder / "model.gguf"
    file.write_bytes(content)
    assert "this is not a whole GGUF file" in is_refused_everywhere(person, model_name_or_path=str(file))


@pytest.fixture(scope="module")
def adapter(small_keys, tmp_path_factory) -> str:
    import luthier

    folder = tmp_path_factory.mktemp("adapters") / "first"
    luthier.train({**small_keys, "finetuning_type": "lora", "output_dir": str(folder), "max_steps": 1})
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_size": 32, "num_attention_heads": 2}, "size mismatch"),
        ({"num_hidden_layers": 3}, "it has no weights for 14 places"),
        ({"num_hidden_layers": 1}, "it has weights for what the model does not have"),
    ],
)
def test_adapter_of_another_base_model(person, adapter, changes, reason):
    other = str(tiny_llama(person.folder / "other", **changes))
    keys = {"model_name_or_path": other, "adapter_name_or_path": adapter, "finetuning_type": "lora"}
    said = is_refused_everywhere(person, **keys)
    assert f"{adapter}: this adapter does not fit the model {other}: it was trained on {person.world}" in said
    assert reason in said
    assert "set model_name_or_path to the model it was trained on" in said


def test_missing_adapter(person, adapter):
    missing = str(person.folder / "none")
    said = is_refused_everywhere(person, adapter_name_or_path=missing, finetuning_type="lora")
    assert "there is no such adapter folder" in said
    said = person.is_refused(adapter_name_or_path=adapter)
    assert "adapters are loaded by finetuning_type: lora or oft only" in said
    said = is_refused_everywhere(person, model_name_or_path=adapter)
    assert "this is an adapter, not a model -> give it as adapter_name_or_path" in said


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("adapter_model.safetensors", None, "this file is cut off or damaged"),
        ("adapter_config.json", "{", "adapter_config.json: this is not valid JSON"),
        ("adapter_config.json", "{}", "adapter_config.json: this names no peft_type"),
        ("adapter_config.json", '{"peft_type": "NOPE"}', "the installed peft cannot read this adapter"),
    ],
)
def test_broken_adapter(person, adapter, name, content, reason):
    broken = person.folder / "broken"
    shutil.copytree(adapter, broken)
    whole = (broken / name).read_bytes()
    (broken / name).write_bytes(whole[:-10] if content is None else content.encode())
    assert reason in person.is_refused(adapter_name_or_path=str(broken), finetuning_type="lora")


def test_names_that_no_module_has(person):
    said = person.is_refused(finetuning_type="lora", lora_target="q_prj")
    assert "lora_target: no module of this model is called 'q_prj'; did you mean 'q_proj'?" in said
    said = person.is_refused(finetuning_type="freeze", freeze_trainable_modules="mpl")
    assert "did you mean 'mlp'?" in said
