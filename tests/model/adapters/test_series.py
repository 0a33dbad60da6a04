"""An adapter that was trained on top of others is loaded with them, wherever they lie, or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import luthier
from luthier.config.load import load_infer, load_train, read_source
from luthier.core.errors import ConfigError, ModelError
from luthier.core.manifest import file_sha256, read_manifest, verify_folder
from luthier.model.adapters._series import MERGED, SERIES_FILE, check_series, read_series
from luthier.model.backends import load_for_inference
from luthier.model.files.sources import ModelSource
from luthier.run import check
from luthier.workflow.preflight import load_checked
from luthier.workflow.training import train
from tests.small_world import small_world

IDS = torch.tensor([[65, 66, 67, 68, 69]])
ALONE = r"second: this adapter was trained on top of .*first, and here it is put on the model alone"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    """`first` on the model, `second` on top of it, `other` beside it."""
    root = tmp_path_factory.mktemp("series")
    keys = {**small_world(root), "finetuning_type": "lora", "lora_rank": 4, "max_steps": 2, "report_to": "none"}
    keys |= {"overwrite_output_dir": False, "val_size": 4, "learning_rate": 0.05}
    learn(keys, root / "first")
    learn(keys, root / "other", seed=3)
    learn(keys, root / "second", adapter_name_or_path=str(root / "first"), create_new_adapter=True, save_steps=1)
    return keys


def learn(keys: dict[str, Any], folder: Path, **more: Any) -> Any:
    save = {"save_strategy": "steps"} if "save_steps" in more else {}
    return train(load_train({**keys, **save, **more, "output_dir": str(folder)}))


@pytest.fixture
def root(world) -> Path:
    return Path(world["output_dir"]).parent


def given(*folders: Path) -> dict[str, str]:
    return {"adapter_name_or_path": ",".join(map(str, folders)), "finetuning_type": "lora", "template": "chatml"}


def loaded(world: dict[str, Any], *folders: Path, **more: Any) -> torch.Tensor:
    """The logits of what chat and predict load."""
    keys = {"model_name_or_path": world["model_name_or_path"], **given(*folders), **more}
    model = load_for_inference(load_infer(keys))
    with torch.no_grad():
        return model(IDS.to(model.device)).logits.cpu()


def in_plain_peft(world: dict[str, Any], *folders: Path) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(world["model_name_or_path"], dtype=torch.float32)
    for folder in folders:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_the_folder_names_what_its_adapter_was_trained_on_and_checkpoints_do_too(world, root):
    for folder in (root / "second", root / "second" / "checkpoint-1"):
        content = json.loads((folder / SERIES_FILE).read_text())
        weights = file_sha256(root / "first" / "adapter_model.safetensors")
        assert content == {"adapters": [{"path": str(root / "first"), "sha256": weights}]}
        assert verify_folder(folder) == []
    assert not (root / "first" / SERIES_FILE).exists()


def test_the_whole_series_computes_what_plain_peft_computes(world, root):
    folders = (root / "first", root / "second")
    torch.testing.assert_close(loaded(world, *folders), in_plain_peft(world, *folders), atol=1e-5, rtol=0)


def test_alone_it_is_refused_by_every_command(world, root, tmp_path, capsys):
    second = root / "second"
    remedy = f"-> set adapter_name_or_path: {root / 'first'},{second}"
    with pytest.raises(ModelError, match=ALONE) as caught:
        loaded(world, second)
    assert remedy in str(caught.value)
    for task in (
        {"do_train": True},
        {"do_train": False, "do_eval": True},
        {"do_train": False, "do_predict": True, "predict_with_generate": True},
    ):
        with pytest.raises(ModelError, match=ALONE):
            train(load_train({**world, **task, **given(second), "output_dir": str(tmp_path / "out")}))
    with pytest.raises(ModelError, match=ALONE):
        export = {"model_name_or_path": world["model_name_or_path"], **given(second)}
        luthier.export({**export, "export_dir": str(tmp_path / "merged")})
    run = {**world, **given(second), "output_dir": str(tmp_path / "new")}
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    assert check.main([str(tmp_path / "run.yaml")]) == 0, "the model may be on another machine"
    assert f"this adapter was trained on top of {root / 'first'}" in "".join(capsys.readouterr())
    with pytest.raises(ConfigError, match="this adapter was trained on top of") as refused:
        load_checked("train", read_source(tmp_path / "run.yaml"), begins=True)
    assert remedy in str(refused.value)


@pytest.mark.parametrize("order", [("other", "second"), ("second", "first"), ("first", "other", "second")])
def test_another_one_or_another_order_is_refused_with_the_right_one(world, root, order):
    with pytest.raises(ModelError, match="was trained on top of") as caught:
        loaded(world, *(root / name for name in order))
    assert f"set adapter_name_or_path: {root / 'first'},{root / 'second'}" in str(caught.value)


def test_folders_may_move_and_the_remedy_names_where_they_are(world, root, tmp_path):
    for name in ("first", "second"):
        shutil.copytree(root / name, tmp_path / f"my {name}")
    expected = loaded(world, root / "first", root / "second")
    assert torch.equal(loaded(world, tmp_path / "my first", tmp_path / "my second"), expected)
    with pytest.raises(ModelError, match="was trained on top of") as caught:
        loaded(world, tmp_path / "my second", tmp_path / "my first")
    assert f"adapter_name_or_path: {tmp_path / 'my first'},{tmp_path / 'my second'}" in str(caught.value)


def test_adapters_of_one_base_may_still_be_merged_one_after_the_other(world, root):
    folders = (root / "first", root / "other")
    torch.testing.assert_close(loaded(world, *folders), in_plain_peft(world, *folders), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["lora", "oft"])
def test_each_adapter_of_a_long_series_names_all_before_it(world, root, tmp_path, kind):
    third, fourth = tmp_path / "third", tmp_path / "fourth"
    before = f"{root / 'first'},{root / 'second'}"
    own = {"lora_rank": 4} if kind == "lora" else {"oft_block_size": 16}
    keys = {name: value for name, value in world.items() if name != "lora_rank"}
    keys |= {"finetuning_type": kind, **own}
    learn(keys, third, adapter_name_or_path=before, create_new_adapter=True)
    assert [one.path for one in read_series(third)] == before.split(",")
    learn(keys, fourth, adapter_name_or_path=f"{before},{third}")  # the third is trained further
    assert read_series(fourth) == read_series(third)
    with pytest.raises(ModelError, match=r"third: this adapter was trained on top of .*first, .*second, and here"):
        loaded(world, root / "first", third)
    assert loaded(world, root / "first", root / "second", fourth).shape[1] == IDS.shape[1]


def test_a_model_that_the_others_were_merged_into_takes_the_last_one(world, root, tmp_path):
    merged, model = tmp_path / "merged", world["model_name_or_path"]
    luthier.export({"model_name_or_path": model, **given(root / "first"), "export_dir": str(merged)})
    (one,) = read_manifest(merged)[MERGED]
    assert one["sha256"] == file_sha256(root / "first" / "adapter_model.safetensors")
    expected = loaded(world, root / "first", root / "second")
    there = {**world, "model_name_or_path": str(merged)}
    torch.testing.assert_close(loaded(there, root / "second"), expected, atol=1e-5, rtol=0)
    learn(there, tmp_path / "new")
    assert [one.sha256 for one in read_series(tmp_path / "new")] == [one["sha256"]]
    with pytest.raises(ModelError, match="new: this adapter was trained on top of"):
        loaded(world, tmp_path / "new")
    torch.testing.assert_close(
        loaded(world, root / "first", tmp_path / "new"), loaded(there, tmp_path / "new"), atol=1e-5, rtol=0
    )
    with pytest.raises(ModelError, match=r"other: .*set model_name_or_path to the model that these were trained on"):
        second = tmp_path / "other"
        shutil.copytree(root / "second", second)
        (second / SERIES_FILE).write_text(json.dumps({"adapters": [{"path": "else", "sha256": "0"}]}))
        check_series([str(second)], [second], ModelSource(str(merged)))


def test_adapters_of_a_reference_and_of_a_reward_model_are_compared_too(world, root, tmp_path):
    base, second = world["model_name_or_path"], str(root / "second")
    dpo = {"stage": "dpo", "dataset": "pairs", "ref_model": base, "ref_model_adapters": second}
    with pytest.raises(ModelError, match=ALONE) as caught:
        learn(world, tmp_path / "dpo", **dpo)
    assert f"set ref_model_adapters: {root / 'first'},{second}" in str(caught.value)
    scorer = {"stage": "rm", "dataset": "pairs", "adapter_name_or_path": str(root / "first")}
    learn(world, tmp_path / "scorer", **scorer, create_new_adapter=True)
    ppo = {"stage": "ppo", "reward_model": str(tmp_path / "scorer"), "reward_model_type": "lora"}
    with pytest.raises(ModelError, match="scorer: this adapter was trained on top of") as caught:
        learn(world, tmp_path / "ppo", **ppo, max_new_tokens=4)
    remedy = f"reward_model_adapters: {root / 'first'},{tmp_path / 'scorer'}"
    assert f"reward_model_type: full, reward_model: {base} and {remedy}" in str(caught.value)


def test_a_checkpoint_is_resumed_with_what_it_was_trained_on(world, root, tmp_path):
    shutil.copytree(root / "second", tmp_path / "out")
    keys = {"adapter_name_or_path": str(root / "other"), "create_new_adapter": True, "save_steps": 1}
    for name in ("adapter_model.safetensors", "checkpoint-2"):
        path = tmp_path / "out" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelError, match=r"checkpoint-1: its adapter was trained on top of .*first, and here .*other"):
        learn(world, tmp_path / "out", **keys)
    learn(world, tmp_path / "out", **{**keys, "adapter_name_or_path": str(root / "first")})
    ours, theirs = (folder / "adapter_model.safetensors" for folder in (tmp_path / "out", root / "second"))
    assert file_sha256(ours) == file_sha256(theirs)


@pytest.mark.parametrize("content", ["{", "[]", '{"adapters": [1]}', '{"adapters": [{"path": "a"}]}', "{}"])
def test_a_damaged_record_is_one_sentence(world, root, tmp_path, content):
    shutil.copytree(root / "second", tmp_path / "second")
    (tmp_path / "second" / SERIES_FILE).write_text(content)
    with pytest.raises(ModelError, match=f"{SERIES_FILE}: .*"):
        loaded(world, tmp_path / "second")
