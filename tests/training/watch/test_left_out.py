"""A step that is not finite leaves no trace: the weights are those of a run without its rows.

The embedding of `~` is NaN, and no adapter changes it. So rows with a `~` have a loss that is NaN, and others do not.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import luthier
from luthier.core.errors import RunFailed
from luthier.core.manifest import verify_folder
from luthier.training.trainer import StageTrainer
from luthier.training.watch.left_out import KEY, LeftOut
from tests.matrix import representatives
from tests.small_world import losses, small_world
from tests.tiny import byte_tokenizer, tiny_llama

BATCH = 4
SAVES = {"save_strategy": "steps", "save_steps": 2}
SKIP = {"on_nonfinite": "skip"}
ROLLBACK = {"on_nonfinite": "rollback", **SAVES}
LAYOUTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    "padded": {"flash_attn": "disabled"},
    "streamed": {"streaming": True},
    "unclipped": {"max_grad_norm": 0},
    "dpo": {"stage": "dpo"},
    "rm": {"stage": "rm"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("world"))
    weights_file = Path(values["model_name_or_path"], "model.safetensors")
    weights = load_file(weights_file)
    weights["model.embed_tokens.weight"][byte_tokenizer().convert_tokens_to_ids("~")] = torch.nan
    save_file(weights, weights_file, metadata={"format": "pt"})
    return {**values, "finetuning_type": "lora", "lr_scheduler_type": "constant", "overwrite_output_dir": False}


@pytest.fixture
def trained(world, tmp_path) -> Callable[..., tuple[dict[str, torch.Tensor], list[dict[str, Any]], Path]]:
    """Trains on the rows of these steps, in this order. Returns what was learned, the log and the output folder."""

    def train(name: str, steps: Collection[int], bad: Collection[int] = (), **keys: Any) -> Any:
        data, out = tmp_path / f"{name} data", tmp_path / name
        if not data.exists():
            write_rows(data, steps, bad, is_pair=keys.get("stage", "sft") != "sft")
        keys = {**world, "max_steps": len(steps), **keys, "dataset_dir": str(data), "output_dir": str(out)}
        result = luthier.train(keys)
        (file,) = [*out.glob("adapter_model.safetensors"), *out.glob("model.safetensors")]
        return load_file(file), [line for line in result.log_history if "epoch" in line], out

    return train


def write_rows(folder: Path, steps: Collection[int], bad: Collection[int], *, is_pair: bool) -> None:
    """`BATCH` rows for each step. The third row of a bad one has a `~`."""
    folder.mkdir()
    rows = []
    for step in steps:
        for number in range(BATCH):
            mark = "~" if step in bad and number == 2 else ""
            answer = f"{'very ' * (number % 3)}well: {step} {number}"
            pair = {"chosen": answer, "rejected": f"no{'!' * number}"}
            rows.append({"instruction": f"{mark}Say {step}.", **(pair if is_pair else {"output": answer})})
    (folder / "numbers.json").write_text(json.dumps(rows))
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {"file_name": "numbers.json", **({"ranking": True, "columns": columns} if is_pair else {})}
    (folder / "dataset_info.json").write_text(json.dumps({"numbers": info}))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name].nan_to_num(), expected[name].nan_to_num()) for name in expected)


@pytest.mark.parametrize("layout", representatives(LAYOUTS, "lora", "accumulated", "dpo"))
def test_skipping_a_step_is_training_without_its_rows(trained, said, layout):
    keys = LAYOUTS[layout]
    expected, whole, _ = trained("without", [1, 2, 4, 5], **keys)
    found, lines, out = trained("skip", [1, 2, 3, 4, 5], [3], **keys, **SKIP)
    assert_same(found, expected)
    (warning,) = (text for text in said if "is left out" in text)
    assert "step 3: the loss became nan, so its update is left out, and training continues after it (1 of at" in warning
    assert any("Say 3." in row and "~" in row for row in warning.splitlines()[1:])
    logged = [line["loss"] for line in lines if "loss" in line]
    assert logged == [line["loss"] for line in whole if "loss" in line] and len(logged) == 4
    assert [line.get(KEY) for line in lines if "learning_rate" in line] == [None, None, 1, 1, 1]
    assert lines[-1]["train_loss"] == pytest.approx(whole[-1]["train_loss"])
    assert json.loads((out / "train_results.json").read_text())[f"train_{KEY}"] == 1
    for line in (out / "trainer_log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize("layout", representatives(LAYOUTS, "lora", "streamed"))
def test_going_back_leaves_out_all_steps_since_the_last_checkpoint(trained, said, layout):
    """Steps 3 and 4 are left out, since step 4 is not finite and the last checkpoint is that of step 2."""
    keys = LAYOUTS[layout]
    expected, _, _ = trained("without", [1, 2, 5], **keys)
    found, _, out = trained("back", [1, 2, 3, 4, 5], [4], **keys, **ROLLBACK)
    assert_same(found, expected)
    assert any(f"so weights and optimizer go back to {out / 'checkpoint-2'}, and training" in text for text in said)
    assert verify_folder(out / "checkpoint-4") == []


def test_without_a_checkpoint_the_update_is_left_out(trained, said):
    found, _, _ = trained("back", [1, 2, 3], [1], **ROLLBACK)
    assert_same(found, trained("without", [2, 3])[0])
    assert any("step 1: the loss became nan, so its update is left out" in text for text in said)


def test_the_schedule_goes_on(trained):
    """The rate of a step is that of its number, whatever was left out or taken back before."""
    keys = {"lr_scheduler_type": "cosine", "warmup_steps": 2}
    rates = [
        [line["learning_rate"] for line in trained(name, range(1, 7), bad, **keys, **how)[1] if "learning_rate" in line]
        for name, bad, how in (("undisturbed", [], SAVES), ("skip", [3], SKIP), ("back", [4], ROLLBACK))
    ]
    assert rates[0] == rates[1] == rates[2] and len(set(rates[0])) == 5


@pytest.mark.parametrize("how", [SKIP, ROLLBACK], ids=["skip", "rollback"])
def test_a_run_that_resumes_behind_such_a_step_ends_the_same(trained, tmp_path, how):
    keys = {"lr_scheduler_type": "cosine", "lora_dropout": 0.1, **how, **SAVES}
    expected, whole, out = trained("whole", range(1, 7), [3], **keys)
    shutil.copytree(out / "checkpoint-4", tmp_path / "again" / "checkpoint-4")
    shutil.copytree(tmp_path / "whole data", tmp_path / "again data")
    found, lines, _ = trained("again", range(1, 7), [3], **keys)
    assert_same(found, expected)
    assert [line["loss"] for line in lines if "loss" in line] == [line["loss"] for line in whole if "loss" in line]
    assert lines[-2][KEY] == 1


def test_the_budget_is_that_of_the_whole_run(trained, tmp_path):
    keys = {**SKIP, **SAVES, "max_nonfinite_steps": 1}
    with pytest.raises(RunFailed, match=r"nan after 1 steps that were left out \(max_nonfinite_steps\) at step 4; the"):
        trained("out", range(1, 7), [1, 4], **keys)
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(RunFailed, match=r"at step 4; the last good checkpoint is .*/checkpoint-2 -> lower"):
        trained("out", range(1, 7), [1, 4], **keys)


def test_stop_is_the_default(trained):
    with pytest.raises(RunFailed, match=r"the loss became nan at step 2; no checkpoint was saved before") as failure:
        trained("out", [1, 2, 3], [2])
    assert "~" in str(failure.value)


def spoil_gradients(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """The last gradient of these steps becomes infinite, as after an overflow of the backward pass."""
    step = StageTrainer.training_step

    def spoiled(trainer: StageTrainer, model: Any, *args: Any) -> Any:
        loss = step(trainer, model, *args)
        if trainer.state.global_step + 1 in steps:
            next(weight for weight in model.parameters() if weight.grad is not None).grad.view(-1)[0] = torch.inf
        return loss

    monkeypatch.setattr(StageTrainer, "training_step", spoiled)


def test_a_gradient_that_is_infinite_stops_the_run_and_is_not_saved(trained, tmp_path, monkeypatch):
    spoil_gradients(monkeypatch, 2)
    with pytest.raises(RunFailed, match=r"the norm of the gradient became inf at step 2; no checkpoint") as failure:
        trained("out", [1, 2, 3], save_strategy="steps", save_steps=2)
    assert str(failure.value).count("Say 2.") == BATCH
    assert not list((tmp_path / "out").glob("*checkpoint*"))


GRADIENTS: dict[str, dict[str, Any]] = {
    "sft full": {"finetuning_type": "full"},
    "pt packed": {"stage": "pt", "dataset": "plain", "cutoff_len": 48},
    "sft packed": {"packing": True, "cutoff_len": 128},
    "kto": {"stage": "kto", "dataset": "feedback", "learning_rate": 1e-3},
    "gkd own answers": {"stage": "gkd", "gkd_lambda": 0.5, "max_new_tokens": 6, "top_k": 0},
    "grpo": {"stage": "grpo", "num_generations": 4, "num_iterations": 2, "grpo_beta": 0.1},
    "ppo": {"stage": "ppo", "ppo_epochs": 2, "ppo_buffer_size": 1, "learning_rate": 1e-3},
    "muon": {"finetuning_type": "full", "use_muon": True},
    "galore": {"finetuning_type": "full", "use_galore": True, "galore_rank": 4},
    "badam": {"finetuning_type": "full", "use_badam": True},
    "apollo": {"finetuning_type": "full", "use_apollo": True, "apollo_rank": 4},
    "adam mini": {"finetuning_type": "full", "use_adam_mini": True},
    "pissa": {"pissa_init": True, "pissa_iter": 4, "lora_rank": 4},
}
ANSWERS = {"max_new_tokens": 6, "temperature": 1.0, "top_k": 0, "reward_funcs": "tests.small_world:small_letters"}


@pytest.mark.parametrize("how", ["skip", "rollback"])
@pytest.mark.parametrize("kind", representatives(GRADIENTS, "sft full", "kto", "grpo"))
def test_every_stage_and_optimizer_goes_on(world, tmp_path, monkeypatch, kind, how):
    """The weights after a step that is left out are those before it, or those of the checkpoint, bit for bit."""
    keys = GRADIENTS[kind]
    keys = {**world, **(ANSWERS if keys.get("stage") in ("grpo", "ppo") else {}), **keys, "max_steps": 5}
    keys |= {"model_name_or_path": str(finite_model(world, tmp_path)), **SAVES, "save_steps": 1, "on_nonfinite": how}
    if keys["stage"] == "gkd":  # of a teacher that is the model itself there is nothing to learn
        keys["teacher_model"] = str(tiny_llama(tmp_path / "teacher", seed=7, max_position_embeddings=1024))
    spoil_gradients(monkeypatch, 3)
    result = luthier.train({**keys, "output_dir": str(tmp_path / "out")})
    before, after, end = (learned(tmp_path / "out" / f"checkpoint-{step}") for step in (2, 3, 5))
    assert_same(after, before)
    assert any(not torch.equal(end[name], before[name]) for name in end)
    assert result.metrics["train"][f"train_{KEY}"] == 1 and len(losses(result)) == 4


def learned(folder: Path) -> dict[str, torch.Tensor]:
    found = [*folder.glob("adapter_model.safetensors"), *folder.glob("model.safetensors")]
    return {name: weight for file in found for name, weight in load_file(file).items()}


def finite_model(world: dict[str, Any], folder: Path) -> Path:
    model = Path(shutil.copytree(world["model_name_or_path"], folder / "model"))
    weights = load_file(model / "model.safetensors")
    save_file({name: w.nan_to_num() for name, w in weights.items()}, model / "model.safetensors", {"format": "pt"})
    return model


def test_means_are_those_of_the_steps_that_count():
    """transformers divides the losses 1 + 2 by three steps; the third has none."""
    counts = LeftOut("skip", 10)
    for is_left_out in (False, True, False):
        counts.count(is_left_out=is_left_out)
    logs = {"loss": 1.0, "learning_rate": 0.1}
    counts.correct_line(logs, 1)
    assert logs == {"loss": 1.5, "learning_rate": 0.1, KEY: 1}
    counts.count(is_left_out=True)
    logs = {"loss": 0.0}
    counts.correct_line(logs, 2)
    assert logs == {KEY: 2}
    end = {"train_loss": 1.0}
    assert counts.here == 2
    counts.correct_end(end, 4, 2)
    assert end == {"train_loss": 2.0, f"train_{KEY}": 2}


@pytest.mark.thorough
def test_processes_leave_out_the_same_steps(trained, world, tmp_path):
    """The bad row of step 4 is in the share of one process; with FSDP each has a part of the weights."""
    write_rows(tmp_path / "data", range(1, 6), [4], is_pair=False)
    common = {**world, "per_device_train_batch_size": BATCH // 2, "max_steps": 5}
    common |= {"dataset_dir": str(tmp_path / "data"), "optim": "sgd", "learning_rate": 0.1}
    runs = {"ddp skip": SKIP, "ddp back": ROLLBACK, "fsdp back": {**ROLLBACK, "fsdp": True}}
    # With so large an epsilon AdamW does not make a step of rounding, and still has a state.
    with_state = {"optim": "adamw_torch", "adam_epsilon": 1.0}
    runs["fsdp back, with a state"] = {**runs["fsdp back"], **with_state}
    files = []
    for name, keys in runs.items():
        files.append(tmp_path / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump({**common, **keys, "output_dir": str(tmp_path / name)}))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "tests.runs.each_of", *map(str, files)]
    done = subprocess.run(words, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not list(tmp_path.glob("*.error*")), done.stderr
    assert done.stderr.count("step 4: the loss became nan") == 4, done.stderr
    assert done.stderr.count("~") == 4, "the row is named whichever process had it"
    plain = {"optim": "sgd", "learning_rate": 0.1}
    expected = {"ddp skip": trained("skip", [1, 2, 3, 5], **plain)[0]}
    expected["ddp back"] = expected["fsdp back"] = trained("back", [1, 2, 5], **plain)[0]
    expected["fsdp back, with a state"] = trained("state", [1, 2, 5], **{**plain, **with_state})[0]
    for name, weights in expected.items():
        found = learned(tmp_path / name)
        assert all((found[key] - weight).abs().max() < 1e-5 for key, weight in weights.items()), name
