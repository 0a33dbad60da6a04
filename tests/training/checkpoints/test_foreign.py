"""Checkpoints of plain transformers.Trainer, with and without peft, as LLaMA-Factory writes them."""

import json
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import luthier
from luthier.cli import main
from luthier.core.errors import OutputError
from luthier.training.checkpoints.foreign import is_foreign
from luthier.training.checkpoints.store import resume_point
from luthier.training.checkpoints.trained_on import KEY
from luthier.training.trainer import StageTrainer
from tests.small_world import losses, small_world

STEPS, SAVED_AT = 6, 3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAME: dict[str, Any] = {
    "max_steps": STEPS,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "per_device_train_batch_size": 4,
    "logging_steps": 1,
    "seed": 7,
    "save_steps": SAVED_AT,
}
"""What a user of both programs writes for both."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("world"))
    return {**values, **SAME, "disable_shuffling": False, "overwrite_output_dir": False}


@pytest.fixture(scope="module")
def rows(world, tmp_path_factory, request) -> Dataset:
    """Ids and labels as luthier makes them."""
    path = tmp_path_factory.mktemp("rows") / "run.json"
    path.write_text(json.dumps(world))
    capture = request.getfixturevalue("capture_all")
    lines = capture(["data", str(path), "--json"])
    return Dataset.from_list([{name: row[name] for name in ("input_ids", "labels")} for row in map(json.loads, lines)])


@pytest.fixture(scope="session")
def capture_all():
    """Runs a command and returns the lines that it prints."""
    import contextlib
    import io

    def capture(words: list[str]) -> list[str]:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert main(words) == 0
        return out.getvalue().splitlines()

    return capture


@pytest.fixture(scope="module", params=["lora", "full"])
def plain(request, world, rows, tmp_path_factory) -> tuple[str, Path]:
    """(finetuning type, output folder of a plain Trainer that has trained to the end, with two checkpoints)."""
    folder = tmp_path_factory.mktemp(f"plain-{request.param}")
    tokenizer = AutoTokenizer.from_pretrained(world["model_name_or_path"])
    model = AutoModelForCausalLM.from_pretrained(world["model_name_or_path"], dtype=torch.float32)
    if request.param == "lora":
        config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
        torch.manual_seed(SAME["seed"])
        model = get_peft_model(model, config)
    args = TrainingArguments(output_dir=str(folder), report_to=[], use_cpu=True, **SAME)
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
    Trainer(model, args, data_collator=collator, train_dataset=rows, processing_class=tokenizer).train()
    return request.param, folder


@pytest.fixture
def checkpoint(plain) -> Path:
    return plain[1] / f"checkpoint-{SAVED_AT}"


def test_training_continues_as_the_plain_trainer_does(world, plain, checkpoint, tmp_path, monkeypatch, said):
    """Optimizer and schedule are the saved ones to the bit; losses and weights are those of the plain Trainer."""
    loaded: list[dict[str, Any]] = []
    load = StageTrainer._load_optimizer_and_scheduler

    def note(trainer, folder):
        load(trainer, folder)
        states = {"optimizer": trainer.optimizer, "schedule": trainer.lr_scheduler}
        loaded.append(deepcopy({name: part.state_dict() for name, part in states.items()}))

    monkeypatch.setattr(StageTrainer, "_load_optimizer_and_scheduler", note)
    kind, folder = plain
    keys = {**world, "finetuning_type": kind, "resume_from_checkpoint": str(checkpoint)}
    result = luthier.train({**keys, "output_dir": str(tmp_path / "out")})
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    theirs = [logs["loss"] for logs in state["log_history"] if "loss" in logs]
    assert losses(result) == pytest.approx(theirs, abs=2e-5) and len(theirs) == STEPS
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    found = loaded[0]["optimizer"]["state"]
    assert found.keys() == saved.keys() and len(saved) > 10
    for index, moments in saved.items():
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(torch.as_tensor(found[index][name]).cpu(), torch.as_tensor(moments[name]))
    assert loaded[0]["schedule"]["last_epoch"] == SAVED_AT
    name = "adapter_model.safetensors" if kind == "lora" else "model.safetensors"
    own, other = load_file(tmp_path / "out" / name), load_file(folder / f"checkpoint-{STEPS}" / name)
    assert own.keys() == other.keys()
    assert all(torch.allclose(own[key].float(), other[key].float(), atol=2e-5) for key in own)
    told = [text for text in said if f"{checkpoint}: " in text]
    assert any("training_args.bin is not read" in text for text in told)
    assert any("its rows are not known" in text for text in told) and len(told) == 2


@pytest.mark.parametrize("plain", ["lora"], indirect=True)
def test_its_adapter_can_be_named(world, checkpoint, tmp_path):
    """With a learning rate of nothing, the weights stay those of the checkpoint."""
    keys = {**world, "finetuning_type": "lora", "adapter_name_or_path": str(checkpoint), "learning_rate": 1e-12}
    luthier.train({**keys, "max_steps": 1, "output_dir": str(tmp_path / "out")})
    name = "adapter_model.safetensors"
    own, saved = load_file(tmp_path / "out" / name), load_file(checkpoint / name)
    assert own.keys() == saved.keys() and all(torch.allclose(own[key], saved[key], atol=1e-9) for key in own)


@pytest.mark.parametrize("plain", ["lora"], indirect=True)
def test_what_cannot_be_taken_over_is_named(world, checkpoint, tmp_path, said):
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    (copy / "rng_state.pth").rename(copy / "rng_state_0.pth")
    shutil.copy(copy / "rng_state_0.pth", copy / "rng_state_1.pth")
    (copy / "scheduler.pt").unlink()
    state = json.loads((copy / "trainer_state.json").read_text())
    state["stateful_callbacks"]["LogCallback"] = {}
    (copy / "trainer_state.json").write_text(json.dumps(state))
    more = {"lora_alpha": 4, "per_device_train_batch_size": 2, "resume_from_checkpoint": str(copy)}
    luthier.train({**world, **more, "finetuning_type": "lora", "output_dir": str(tmp_path / "out")})
    told = "\n".join(text for text in said if f"{copy}: " in text)
    for part in (
        "its random numbers are those of 2 processes, and this run has 1",
        "without scheduler.pt the optimizer state is not read either",
        "its adapter has lora_alpha 16, and this run computes with 4",
        "its batches have 4 rows, and those of this run 2",
        "callbacks that luthier does not have is left out: LogCallback",
    ):
        assert part in told, told


@pytest.mark.parametrize("plain", ["lora"], indirect=True)
def test_an_adapter_on_other_layers_is_refused(world, checkpoint, tmp_path):
    keys = {**world, "finetuning_type": "lora", "lora_target": "q_proj", "resume_from_checkpoint": str(checkpoint)}
    with pytest.raises(OutputError, match=r"its adapter is not on the layers .* is in the checkpoint alone"):
        luthier.train({**keys, "output_dir": str(tmp_path / "out")})


@pytest.mark.parametrize("plain", ["lora"], indirect=True)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_a_file_that_is_cut_off_is_named(checkpoint, tmp_path, name):
    copy = shutil.copytree(checkpoint, tmp_path / "checkpoint-3")
    (copy / name).write_bytes((copy / name).read_bytes()[:-64])
    with pytest.raises(OutputError, match=rf"resume_from_checkpoint: .*{name}.* is cut off"):
        resume_point(tmp_path / "out", str(copy), overwrite=False)


def test_which_checkpoints_are_of_another_program(tmp_path):
    assert not is_foreign(tmp_path)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3, "stateful_callbacks": {"TrainerControl": {}}}')
    assert is_foreign(tmp_path)
    with pytest.raises(OutputError, match="holds no weights"):
        resume_point(tmp_path / "out", str(tmp_path), overwrite=False)
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "stateful_callbacks": {KEY: []}}))
    assert not is_foreign(tmp_path)  # of luthier, so its manifest was lost
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')
    (tmp_path / "manifest.json").write_text("{}")
    assert not is_foreign(tmp_path)
