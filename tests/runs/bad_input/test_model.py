"""Faults in a model's or an adapter's files: told by name, before data are read where the files alone show it."""

import json
import shutil
import struct
from pathlib import Path

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


def test_a_tokenizer_of_another_library(person, model):
    for file in model.glob("*token*"):
        file.unlink()
    (model / "tekken.json").write_text('{"config": {"version": "v3"}, "vocab": []}')
    said = is_refused_everywhere(person, model_name_or_path=str(model))
    assert "the tokenizer is there as tekken.json alone, a format of mistral-common" in said
    assert "copy tokenizer.json and tokenizer_config.json" in said


def test_paths_of_windows(person):
    said = is_refused_everywhere(person, model_name_or_path="models\\qwen")
    assert "there is no such model file or folder" in said
    assert "write it as models/qwen: a backslash separates folders on Windows only" in said
    said = person.is_refused(adapter_name_or_path="saves\\lora")
    assert "there is no such adapter folder -> write it as saves/lora" in said


def test_a_path_of_windows_for_a_folder_that_is_written(person):
    done = person.types("check", person.run_file(output_dir="saves\\lora"))
    assert done.status == 0
    assert (
        "output_dir: 'saves\\\\lora': holds a backslash, which is part of the name here -> write it as saves/lora"
        in done.out
    )


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


@pytest.mark.parametrize("rank", [4, 16])
def test_adapter_of_another_rank_than_its_config_says(person, adapter, rank):
    mixed = Path(shutil.copytree(adapter, person.folder / "mixed"))
    config = json.loads((mixed / "adapter_config.json").read_text())
    assert config["r"] == 8
    (mixed / "adapter_config.json").write_text(json.dumps({**config, "r": rank}))
    said = is_refused_everywhere(person, adapter_name_or_path=str(mixed), finetuning_type="lora")
    own = person.keys["model_name_or_path"]
    assert f"{mixed}: this adapter does not fit the model {own}, although it names it as its own (size mismatch" in said
    assert f"shape torch.Size([8, 64]) from checkpoint, the shape in current model is torch.Size([{rank}, 64])" in said
    assert "copy or download the adapter's files again" in said


def test_adapter_of_another_rank_than_the_run_file_keeps_its_rank(person, adapter):
    outcome = person.trains(adapter_name_or_path=adapter, finetuning_type="lora", lora_rank=4, max_steps=1)
    assert outcome.status == 0
    assert f"adapter {adapter} is trained further as it is (LORA, r 8, lora_alpha 16); the run file" in outcome.err
    assert json.loads((person.out / "adapter_config.json").read_text())["r"] == 8


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


def shards(model) -> None:
    """The weights in two files and an index."""
    from safetensors.torch import load_file, save_file

    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(weights)
    places = {name: f"model-0000{1 + (i > 8)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(places.values())):
        save_file({name: weights[name] for name in names if places[name] == file}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_torn_shard(person, model):
    shards(model)
    file = model / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    said = is_refused_everywhere(person, model_name_or_path=str(model))
    assert "model-00002-of-00002.safetensors: this file is cut off or damaged" in said


@pytest.mark.parametrize("damage", [b"\xff" * 8, b"\x10\x00\x00\x00\x00\x00\x00\x00{not json at all"])
def test_damaged_header(person, model, damage):
    file = model / "model.safetensors"
    file.write_bytes(damage + file.read_bytes()[len(damage) :])
    said = is_refused_everywhere(person, model_name_or_path=str(model))
    assert "this is not a whole safetensors file (its header cannot be read) -> copy or download it again" in said


def test_index_of_other_files(person, model):
    shards(model)
    index = model / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    said = is_refused_everywhere(person, model_name_or_path=str(model))
    assert "it names 1 tensors that are not in their files, such as lm_head.weight in model-00002-of-00002" in said
    index.write_text('{"weight_map": [1]}')
    assert "this index has no weight_map" in is_refused_everywhere(person, model_name_or_path=str(model))


def change_config(model, **changes) -> str:
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(model)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_hidden_layers": 3}, "9 weights of the model are not in its files (model.layers.2.input_layernorm"),
        ({"intermediate_size": 256}, "they have other shapes than config.json says"),
        ({"model_type": "qwen2"}, "6 weights of the model are not in its files"),
        ({"model_type": "clip"}, "transformers has no language model of this type) -> name a model that generates"),
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str"),
        ({"num_attention_heads": 7}, "The hidden size (64) is not a multiple of the number of attention heads (7)"),
        ({"model_type": "gpt17"}, "update transformers"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MineConfig"}},
            "the model comes with Python code of its own, which is run only if asked for) -> read that code, and set",
        ),
    ],
)
def test_config_of_another_model(person, model, changes, reason):
    assert reason in is_refused_everywhere(person, model_name_or_path=change_config(model, **changes))


def test_unexpected_weights_are_reported(person, model, said):
    assert person.trains(model_name_or_path=change_config(model, num_hidden_layers=1)).status == 0
    assert any("9 tensors of its files have no place in the model (model.layers.1" in text for text in said)


def test_encoder_and_decoder(person):
    from transformers import T5Config, T5ForConditionalGeneration

    from tests.tiny import byte_tokenizer

    folder = person.folder / "t5"
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=320, **sizes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    said = person.is_refused(model_name_or_path=str(folder))
    assert "this model has an encoder and a decoder" in said
    assert "take a causal language model" in said


def test_weights_that_no_memory_holds(person, model, tmp_path_factory):
    """A terabyte of zeros, which takes no room on the disk, as one embedding of the model."""
    folder = tmp_path_factory.mktemp("large") / "model"
    shutil.copytree(model, folder)
    num_rows = 10**12 // 4 // 64
    header = {
        "model.embed_tokens.weight": {"dtype": "F32", "shape": [num_rows, 64], "data_offsets": [0, num_rows * 256]}
    }
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + num_rows * 256)
    train = person.run_file(model_name_or_path=str(folder))
    other = {"drop": TRAINING_KEYS, "model_name_or_path": str(folder)}
    for words in (
        ("train", train),
        ("chat", lambda: person.run_file(**other), "--once", "hi"),
        ("export", lambda: person.run_file(**other), f"export_dir={person.folder / 'merged'}"),
    ):
        outcome = person.types(*(word() if callable(word) else word for word in words))
        said = outcome.complaint(2)
        assert "its weights take 1,000.000 GB of memory in float32, and" in said
        assert "are free -> load it in 16 bits (bf16: true or infer_dtype: bfloat16), take a smaller model" in said


def test_the_program_itself_shows_no_traceback(person, model):
    import subprocess
    import sys

    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    command = [sys.executable, "-m", "luthier", "export", f"model_name_or_path={model}", f"export_dir={person.out}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "this file is cut off or damaged: 461,176 bytes instead of 462,176" in done.stderr
