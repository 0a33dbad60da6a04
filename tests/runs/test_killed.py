"""Runs that are killed at any moment of a save, and resumed: the same weights in the end, and nothing is left over."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer_jit_checkpoint import CheckpointManager

import luthier
from luthier.core.errors import RunFailed
from luthier.core.manifest import verify_folder
from luthier.training.checkpoints import store
from luthier.training.checkpoints.store import checkpoints_in, newest_whole
from luthier.training.trainer import StageTrainer
from tests.killing import watching
from tests.matrix import representatives
from tests.small_world import small_world
from tests.tiny import tiny_llama

KINDS: dict[str, dict[str, Any]] = {
    "sft": {},
    "streamed": {"streaming": True, "buffer_size": 7},
    "kto": {"stage": "kto", "dataset": "feedback", "learning_rate": 1e-3},
    "gkd own answers": {"stage": "gkd", "gkd_lambda": 0.5, "max_new_tokens": 6, "top_k": 0},
}
STEPS = 4
BEST = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": "numbers", "load_best_model_at_end": True}
SPOILING = {"optim": "sgd", "learning_rate": 300.0, "max_grad_norm": 1.0}
"""The first evaluation is the best one."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple[dict[str, Any], str]:
    """The keys of every run, and a teacher."""
    teacher = tiny_llama(tmp_path_factory.mktemp("teacher"), seed=7, max_position_embeddings=1024)
    return {
        **small_world(tmp_path_factory.mktemp("world")),
        "finetuning_type": "lora",
        "lora_dropout": 0.1,
        "disable_shuffling": False,
        "overwrite_output_dir": False,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
    }, str(teacher)


def keys_of(world: tuple[dict[str, Any], str], kind: str) -> dict[str, Any]:
    common, teacher = world
    keys = {**common, **KINDS[kind]}
    if keys["stage"] == "gkd":
        keys["teacher_model"] = teacher
    return keys if KINDS[kind].get("stage") not in ("kto", "gkd") else {**keys, "lora_dropout": 0.0}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_end(folder: Path, whole: Path, *, is_streamed: bool) -> None:
    expected, found = weights(whole), weights(folder)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    if is_streamed:
        assert (folder / "data_report.json").read_text() == (whole / "data_report.json").read_text()
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}, "nothing is left over"


@pytest.fixture
def saves(monkeypatch) -> list[StageTrainer]:
    """The trainers that saved a checkpoint."""
    seen: list[StageTrainer] = []
    save = StageTrainer._save_checkpoint

    def noted(trainer: StageTrainer, model: Any, trial: Any) -> None:
        seen.append(trainer)
        save(trainer, model, trial)

    monkeypatch.setattr(StageTrainer, "_save_checkpoint", noted)
    return seen


@pytest.mark.parametrize(
    ("kind", "limit"),
    representatives([(kind, limit) for kind in KINDS for limit in (1, 2)], ("streamed", 1)),
)
def test_a_save_that_is_killed_before_any_change_of_a_file(world, tmp_path, monkeypatch, kind, limit):
    """Between the second checkpoint and the third: one of both is there, and resuming ends as without a kill."""
    keys = {**keys_of(world, kind), "save_total_limit": limit}
    whole, out = tmp_path / "whole", tmp_path / "out"
    luthier.train({**keys, "output_dir": str(whole)})
    save, places = StageTrainer._save_checkpoint, []

    def tried(trainer: StageTrainer, model: Any, trial: Any) -> None:
        """Kills the third save everywhere, each time in a fresh copy of the folder."""
        before = shutil.copytree(out, tmp_path / "before")
        for kill_at in count() if trainer.state.global_step == 3 else ():
            shutil.rmtree(out)
            shutil.copytree(before, out)
            with watching(out, kill_at) as changes:
                save(trainer, model, trial)
            if len(changes) < kill_at:
                break
            places.append(shutil.copytree(out, tmp_path / f"killed {kill_at}"))
        shutil.rmtree(before)
        if trainer.state.global_step != 3:
            save(trainer, model, trial)

    monkeypatch.setattr(StageTrainer, "_save_checkpoint", tried)
    luthier.train({**keys, "output_dir": str(out)})
    monkeypatch.setattr(StageTrainer, "_save_checkpoint", save)
    assert len(places) > 20
    for place in places:
        store.tidy(place)
        found = newest_whole(place)
        assert found is not None and found.name in ("checkpoint-2", "checkpoint-3")
        assert all(verify_folder(folder) == [] for folder in checkpoints_in(place))
        assert not [path.name for path in place.iterdir() if path.name.startswith(".")]
    for place in (places[0], places[len(places) // 2], places[-1]):
        luthier.train({**keys, "output_dir": str(place)})
        assert_same_end(place, whole, is_streamed=kind == "streamed")


class Killed(BaseException):
    """Nothing of a run handles it."""


@pytest.mark.parametrize(
    "more", [{"save_total_limit": 1}, {**BEST, **SPOILING, "save_total_limit": 1}], ids=["", "best"]
)
def test_a_kill_between_the_last_checkpoint_and_the_removal_of_the_oldest(world, tmp_path, monkeypatch, more):
    """No later save removes it: the end of the resumed run does."""
    keys, out = {**keys_of(world, "sft"), **more}, tmp_path / "out"
    luthier.train({**keys, "output_dir": str(tmp_path / "whole")})
    rotate = store.rotate

    def killed(newest: Path, limit: int | None, best: Path | None) -> None:
        if store.step_of(newest) == STEPS:
            raise Killed
        rotate(newest, limit, best)

    monkeypatch.setattr(store, "rotate", killed)
    with pytest.raises(Killed):
        luthier.train({**keys, "output_dir": str(out)})
    monkeypatch.setattr(store, "rotate", rotate)
    assert len(checkpoints_in(out)) > 1
    luthier.train({**keys, "output_dir": str(out)})
    for name in ("train_results.json", "all_results.json"):  # metrics of training, which nothing makes again
        (tmp_path / "whole" / name).unlink()
    assert_same_end(out, tmp_path / "whole", is_streamed=False)


TORN = ("no manifest", "no manifest, no optimizer", "4 KiB of zeros in the weights")


@pytest.mark.parametrize("how", representatives(TORN, *TORN[1:]))
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_the_end_is_the_same(world, tmp_path, said, how):
    keys = {**keys_of(world, "sft"), "save_steps": 2}
    luthier.train({**keys, "output_dir": str(tmp_path / "whole")})
    out = tmp_path / "out"
    for step in (2, 4):
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", out / f"checkpoint-{step}")
    last = out / "checkpoint-4"
    if how.startswith("4 KiB"):
        with (last / "adapter_model.safetensors").open("rb+") as file:
            file.seek(8192)
            file.write(bytes(4096))
    else:
        for name in ("manifest.json", "optimizer.pt")[: 1 + how.count(",")]:
            (last / name).unlink()
    luthier.train({**keys, "output_dir": str(out)})
    assert any(f"{last} is " in line and "and is not used: " in line for line in said)
    assert f"resuming from {out / 'checkpoint-2'}" in said
    assert_same_end(out, tmp_path / "whole", is_streamed=False)


def test_the_best_checkpoint_stays_while_others_go_and_the_newest_goes_last(world, tmp_path, saves, monkeypatch):
    """With a limit of one, both stay until the final weights are saved; then the best one does."""
    kept, log, out = [], StageTrainer.log, tmp_path / "out"

    def noted(trainer: StageTrainer, *args: Any) -> None:
        kept.append({store.step_of(folder) for folder in checkpoints_in(out)})
        log(trainer, *args)

    monkeypatch.setattr(StageTrainer, "log", noted)
    result = luthier.train({**keys_of(world, "sft"), **BEST, **SPOILING, "save_total_limit": 1, "output_dir": str(out)})
    seen = {logs["step"]: logs["eval_loss"] for logs in result.log_history if "eval_loss" in logs}
    assert min(seen, key=seen.__getitem__) == 1, "the test needs a rate that spoils the model"
    assert kept[-1] == {1, STEPS}
    assert [folder.name for folder in checkpoints_in(out)] == ["checkpoint-1"]
    assert saves[-1].state.best_model_checkpoint == str(out / "checkpoint-1")
    best = weights(out / "checkpoint-1")
    assert all(torch.equal(best[name], weight) for name, weight in weights(out).items())
    assert verify_folder(out / "checkpoint-1") == []


def test_a_best_checkpoint_that_was_damaged_is_not_loaded(world, tmp_path, monkeypatch):
    out, load = tmp_path / "out", StageTrainer._load_best_model

    def damaged(trainer: StageTrainer) -> None:
        path = out / "checkpoint-1" / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-64] + bytes(64))
        load(trainer)

    monkeypatch.setattr(StageTrainer, "_load_best_model", damaged)
    with pytest.raises(
        RunFailed, match=r"the best checkpoint \S+/checkpoint-1 is damaged: adapter_model.safetensors: ch"
    ):
        luthier.train({**keys_of(world, "sft"), **BEST, **SPOILING, "output_dir": str(out)})
    assert newest_whole(out) == out / f"checkpoint-{STEPS}"


def test_an_upload_that_fails_costs_no_weights(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda trainer, *_: setattr(trainer, "hub_model_id", "me/mine"))
    keys = {**keys_of(world, "sft"), "max_steps": 2, "push_to_hub": True, "output_dir": str(out)}
    with pytest.raises(RunFailed, match=r"push_to_hub: me/mine: the upload failed .* -> run the same command again"):
        luthier.train(keys)
    assert verify_folder(out) == [] and weights(out)
    uploaded: list[tuple[Path, list[str]]] = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder",
        lambda api, **how: uploaded.append((how["folder_path"], verify_folder(out))),
    )
    luthier.train(keys)
    assert uploaded == [(out, [])]


def test_a_checkpoint_just_in_time_is_whole(world, tmp_path, saves):
    """transformers marks it as incomplete within the folder where it is written."""
    luthier.train({**keys_of(world, "sft"), "max_steps": 2, "output_dir": str(tmp_path)})
    saves[-1].state.global_step = 3
    CheckpointManager(saves[-1]).execute_jit_checkpoint()
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-3"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_killed_runs_left_is_gone_when_a_run_has_ended(world, tmp_path):
    ended = 2**22 + 1  # the number of no process
    keys = {**keys_of(world, "sft"), "max_steps": 2, "output_dir": str(tmp_path)}
    luthier.train({**keys, "max_steps": 1})
    left = [f".{ended}.tmp", f".data_report.json.{ended}.tmp", ".checkpoint-1.earlier"]
    stays = f".{os.getppid()}.tmp"
    for name in (*left, stays):
        shutil.copytree(tmp_path / "checkpoint-1", tmp_path / name)
    luthier.train(keys)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == [stays]
    assert verify_folder(tmp_path) == []


def started(run_file: Path, num_processes: int) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if num_processes > 1:
        environment |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(num_processes)}
    words = [sys.executable, "-m", "luthier", "train", str(run_file)]
    silent = subprocess.DEVNULL
    return subprocess.Popen(words, env=environment, stdout=silent, stderr=silent, start_new_session=True)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill the group of a run as a shell or a scheduler does; what torchrun started in other groups ends with it."""
    if process.poll() is not None:  # this process had to wait, and the run was faster
        assert process.returncode == 0
        return
    started_by_it = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(started_by_it, timeout=120)
    assert not alive, "a process of the run is left over and writes on"


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("kind", "limit", "num_processes"),
    [("sft", 1, 1), ("streamed", 2, 1), ("streamed", 1, 2), ("gkd own answers", 1, 2)],
)
def test_a_run_that_is_killed_again_and_again(world, tmp_path, kind, limit, num_processes):
    """At random moments once it saves. A checkpoint that was there is followed by another whole one, never by none."""
    keys = {**keys_of(world, kind), "max_steps": 40, "save_total_limit": limit}
    run_files = {name: tmp_path / f"{name}.yaml" for name in ("whole", "out")}
    for name, run_file in run_files.items():
        run_file.write_text(yaml.safe_dump({**keys, "output_dir": str(tmp_path / name)}))
    assert started(run_files["whole"], num_processes).wait(300) == 0
    chance, out, reached = random.Random(limit), tmp_path / "out", 0
    for _ in range(4):
        process = started(run_files["out"], num_processes)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            steps = [store.step_of(folder) for folder in checkpoints_in(out)]
            if max(steps, default=0) > reached:
                break
            time.sleep(0.01)
        time.sleep(chance.random() / 5)
        kill(process)
        found = newest_whole(out)
        assert found is not None and store.step_of(found) >= reached
        reached = store.step_of(found)
    assert started(run_files["out"], num_processes).wait(300) == 0
    assert_same_end(out, tmp_path / "whole", is_streamed=kind == "streamed")


def die(*arguments: Any, **more: Any) -> None:
    raise Killed


@pytest.mark.parametrize(
    ("before", "again"),
    [
        ({"max_steps": 2}, {}),  # a longer run on a finished folder
        ({"learning_rate": 1e-3}, {"overwrite_output_dir": True, "resume_from_checkpoint": f"checkpoint-{STEPS}"}),
        ({"learning_rate": 1e-3}, {}),
    ],
)
def test_a_kill_before_the_final_weights_does_not_leave_them_to_an_earlier_run(
    world, tmp_path, monkeypatch, before, again
):
    """Its manifest and metrics neither: the last checkpoint becomes the result, and nothing speaks of other weights."""
    out = tmp_path / "out"
    keys = {**keys_of(world, "sft"), "save_steps": STEPS, "output_dir": str(out)}
    luthier.train({**keys, **before})
    earlier = (out / "train_results.json").read_text()
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(StageTrainer, "save_final", die)
        luthier.train({**keys, "overwrite_output_dir": "learning_rate" in before})
    if "resume_from_checkpoint" in again:
        again = {**again, "resume_from_checkpoint": str(out / again["resume_from_checkpoint"])}
    luthier.train({**keys, **again})
    last = weights(out / f"checkpoint-{STEPS}")
    assert all(torch.equal(last[name], found) for name, found in weights(out).items())
    assert verify_folder(out) == []
    assert not (out / "train_results.json").exists() or (out / "train_results.json").read_text() != earlier
