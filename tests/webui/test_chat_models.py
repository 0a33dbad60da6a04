"""Which models can be talked to, and that each answers for itself: base and tuned are never mixed up."""

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

from luthier.api import train
from luthier.config.load import load_infer
from luthier.core.errors import RunFailed
from luthier.webui.chat_models import LoadedModel, chat_models
from luthier.webui.document import values_of
from tests.small_world import small_world


def finished_run(root: Path, name: str, values: Mapping[str, object], **files: str) -> Path:
    folder = root / "saves" / name
    (folder / "checkpoint-9").mkdir(parents=True)
    (folder / "checkpoint-10").mkdir()
    (folder / "board.yaml").write_text(yaml.safe_dump(dict(values)), "utf-8")
    for stem, text in files.items():
        (folder / f"{stem}.json").write_text(text, "utf-8")
    return folder


def test_results_checkpoints_and_bases_are_offered(tmp_path):
    values = {"model_name_or_path": "models/tiny", "template": "chatml", "learning_rate": 1, "finetuning_type": "lora"}
    folder = finished_run(tmp_path, "one", values, adapter_config="{}")
    for name in ("checkpoint-9", "checkpoint-10"):
        (folder / name / "adapter_config.json").write_text("{}", "utf-8")
    finished_run(tmp_path, "two", values | {"finetuning_type": "full"}, config="{}")
    finished_run(tmp_path, "empty", {"stage": "sft"})
    models = chat_models(tmp_path)
    kept = {"--model_name_or_path=models/tiny", "--template=chatml"}
    tuned = {"--finetuning_type=lora", "--adapter_name_or_path=saves/one"}
    assert {*models["saves/one"].words} == kept | tuned
    assert models["saves/one"].about == "models/tiny + saves/one"
    names = [name for name in models if name.startswith("saves/one")]
    assert names == ["saves/one", "saves/one/checkpoint-10", "saves/one/checkpoint-9"]
    assert models["saves/two"].about == "saves/two"
    assert {*models["models/tiny (base)"].words} == kept
    assert len(models) == 5


def test_a_model_is_loaded_and_asked_as_its_run_says(tmp_path):
    """What only training reads, and what it started from, stays behind."""
    how = {
        "model_name_or_path": "models/tiny",
        "finetuning_type": "lora",
        "model_revision": "v2",
        "trust_remote_code": True,
        "quantization_bit": 8,
        "quantization_method": "hqq",
        "rope_scaling": "yarn",
        "template": "chatml",
        "default_system": "Be brief: yes, no",
        "temperature": 0.5,
    }
    started = {"adapter_name_or_path": "first", "train_from_scratch": True, "lora_rank": 4, "learning_rate": 1e-4}
    finished_run(tmp_path, "one", how | started, adapter_config="{}")
    model = chat_models(tmp_path)["saves/one"]
    assert set(values_of(model.run_file)) == {*how, "adapter_name_or_path"}
    run = load_infer(list(model.words))
    assert run.model.model_revision == "v2" and run.model.trust_remote_code
    assert run.data.default_system == "Be brief: yes, no" and run.generating.temperature == 0.5
    assert run.model.adapter_name_or_path == ("saves/one",)


def test_an_adapter_is_put_on_those_it_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"model_name_or_path": "model", "adapter_name_or_path": "first", "create_new_adapter": True}
    folder = finished_run(tmp_path, "third", values, adapter_config="{}")
    beneath = [{"path": "saves/first", "sha256": "1"}, {"path": "saves/second", "sha256": "2"}]
    (folder / "adapter_trained_on.json").write_text(json.dumps({"adapters": beneath}), "utf-8")

    def given() -> str:
        return values_of(chat_models(tmp_path)["saves/third"].run_file)["adapter_name_or_path"]

    assert given() == "saves/first,saves/second,saves/third"
    run = load_infer(list(chat_models(tmp_path)["saves/third"].words))
    assert run.model.adapter_name_or_path == ("saves/first", "saves/second", "saves/third")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text(json.dumps({"merged_adapters": beneath[:1]}), "utf-8")
    assert given() == "saves/second,saves/third"
    (folder / "adapter_trained_on.json").write_text("{", "utf-8")
    assert given() == "saves/third"


@pytest.mark.thorough
def test_a_series_of_adapters_answers(tmp_path, monkeypatch):
    """The second adapter was trained with `create_new_adapter`, so alone it is refused."""
    monkeypatch.chdir(tmp_path)
    values = small_world(tmp_path) | {"finetuning_type": "lora", "max_steps": 1}
    first, second = (values | {"output_dir": f"saves/{name}"} for name in ("first", "second"))
    train(first)
    train(second | {"adapter_name_or_path": "saves/first", "create_new_adapter": True})
    model = LoadedModel(chat_models(tmp_path)["saves/second"])
    try:
        assert model.model.about.endswith(" + saves/first,saves/second")
        assert isinstance(asyncio.run(said(model, seed=3)), str)
    finally:
        model.close()


def save_adapter(model: str, folder: Path, scale: float) -> None:
    """An adapter whose second matrices are `scale` times a random one; 0 has no effect."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(model), LoraConfig(target_modules=["q_proj", "v_proj"]))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=scale) if scale else torch.nn.init.zeros_(weight)
    tuned.save_pretrained(folder)


async def said(model: LoadedModel, seed: int) -> str:
    request = {"messages": [{"role": "user", "content": "hi"}], "seed": seed, "temperature": 1, "max_tokens": 24}
    return "".join([text async for _, text in model.answer(request)])


@pytest.mark.thorough
def test_answers_are_equal_for_an_adapter_without_effect_and_differ_for_another_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = small_world(tmp_path) | {"finetuning_type": "lora"}
    for name, scale in (("zero", 0.0), ("tuned", 5.0)):
        folder = finished_run(tmp_path, name, values)
        save_adapter(values["model_name_or_path"], folder, scale)
    models = chat_models(tmp_path)
    base_name = f"{values['model_name_or_path']} (base)"
    loaded = {name: LoadedModel(models[name]) for name in (base_name, "saves/zero", "saves/tuned")}
    try:
        answers = {name: asyncio.run(said(model, seed=3)) for name, model in loaded.items()}
        assert answers[base_name] == answers["saves/zero"] != answers["saves/tuned"]
        base = loaded[base_name]
        assert asyncio.run(said(base, seed=4)) != answers[base_name]
        with pytest.raises(RunFailed, match="temperature"):
            asyncio.run(anext(base.answer({"messages": [{"role": "user", "content": "a"}], "temperature": "hot"})))
        base.close()
        assert not base.is_alive
        with pytest.raises(RunFailed, match="does not answer any more"):
            asyncio.run(said(base, seed=3))
    finally:
        for model in loaded.values():
            model.close()
