"""Runs on streamed rows: labels, resuming bit for bit, several processes, and the ledger of the rows."""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import luthier
from luthier.cli import main
from luthier.core.errors import DataError
from luthier.core.manifest import read_manifest, verify_folder
from luthier.training.checkpoints.store import newest_whole
from luthier.training.trainer import StageTrainer
from tests import killable
from tests.matrix import representatives
from tests.small_world import losses, small_world

KINDS: dict[str, dict[str, Any]] = {
    "sft": {"finetuning_type": "lora", "lora_dropout": 0.2},
    "sft packed": {"packing": True, "cutoff_len": 300},
    "sft with workers": {"dataloader_num_workers": 2},
    "pt": {"stage": "pt", "dataset": "plain", "cutoff_len": 48},
    "two datasets": {"dataset": "numbers,tools", "mix_strategy": "interleave_over", "interleave_probs": "0.4,0.6"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {
        **small_world(tmp_path_factory.mktemp("world")),
        "streaming": True,
        "buffer_size": 7,
        "disable_shuffling": False,
        "overwrite_output_dir": False,
        "max_steps": 8,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 4,
    }


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "data_report.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = [*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")]
    return load_file(path)


def assert_equal_ends(first: Path, second: Path) -> None:
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert report(first) == report(second)


@pytest.mark.parametrize("kind", representatives(KINDS, "sft", "two datasets"))
def test_a_resumed_run_equals_an_uninterrupted_one(world, tmp_path, kind):
    """Steps 5 to 8 continue into the second pass of 24 rows; so does the ledger."""
    values = {**world, **KINDS[kind]}
    whole = luthier.train({**values, "output_dir": str(tmp_path / "whole")})
    folder = tmp_path / "out"
    folder.mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", folder / "checkpoint-4")
    shutil.copy(tmp_path / "whole" / "trainer_log.jsonl", folder)
    result = luthier.train({**values, "output_dir": str(folder)})
    assert losses(result) == losses(whole) and len(losses(whole)) == 8
    assert_equal_ends(folder, tmp_path / "whole")
    counted = report(folder)
    assert counted["samples"]["train"] == 8 * 4
    assert all(a["rows_in"] == a["kept"] + sum(a["dropped"].values()) for a in counted["datasets"].values())


def test_the_state_of_the_stream_is_part_of_a_whole_checkpoint(world, tmp_path, monkeypatch):
    """It is there before the last file of transformers is, and the manifest names it."""
    from transformers import TrainerState

    seen, save = [], TrainerState.save_to_json

    def observed(state: TrainerState, path: str) -> None:
        if Path(path).parent.name.startswith("checkpoint-"):
            seen.append((Path(path).parent / "stream_state.json").is_file())
        save(state, path)

    monkeypatch.setattr(TrainerState, "save_to_json", observed)
    luthier.train({**world, "save_steps": 4, "max_steps": 8, "output_dir": str(tmp_path / "out")})
    assert seen == [True, True]
    for step in (4, 8):
        checkpoint = tmp_path / "out" / f"checkpoint-{step}"
        assert "stream_state.json" in read_manifest(checkpoint)["files"] and verify_folder(checkpoint) == []
    (checkpoint / "stream_state.json").unlink()
    assert newest_whole(tmp_path / "out") == tmp_path / "out" / "checkpoint-4"


def test_a_checkpoint_of_a_run_that_did_not_stream_is_a_warning(world, tmp_path, said):
    """Its ledger says nothing of the rows read before."""
    luthier.train({**world, "streaming": False, "max_steps": 4, "output_dir": str(tmp_path)})
    luthier.train({**world, "resume_from_checkpoint": str(tmp_path / "checkpoint-4"), "output_dir": str(tmp_path)})
    assert any("checkpoint-4 is of a run that did not stream, so some rows may be repeated" in text for text in said)


@pytest.mark.thorough
def test_a_killed_run_resumes_with_the_same_rows(world, tmp_path):
    values = {**world, "save_steps": 1, "max_steps": 30, "save_total_limit": 2}
    luthier.train({**values, "output_dir": str(tmp_path / "whole")})
    dies = partial(os.kill, 0, signal.SIGKILL)  # its group, which is its own
    step = partial(killable.at_call, StageTrainer, "training_step", 16, dies)  # the second batch of step 8
    process = killable.start({**values, "output_dir": str(tmp_path / "out")}, tmp_path / "log", changes=step)
    process.join()
    assert process.exitcode == -signal.SIGKILL and newest_whole(tmp_path / "out") == tmp_path / "out" / "checkpoint-7"
    assert not (tmp_path / "out" / "train_results.json").exists()
    luthier.train({**values, "output_dir": str(tmp_path / "out")})
    assert_equal_ends(tmp_path / "out", tmp_path / "whole")


def test_the_ledger_counts_the_rows_of_the_trained_steps(world, tmp_path):
    """Whatever was read ahead: 5 steps of 4 rows without a buffer are the first 20 rows."""
    values = {**world, "max_steps": 5, "disable_shuffling": True, "output_dir": str(tmp_path / "out")}
    luthier.train(values)
    rows = json.loads(Path(values["dataset_dir"], "numbers.json").read_text())[:20]
    account = report(tmp_path / "out")["datasets"]["numbers"]
    assert account["rows_in"] == account["kept"] == 20
    around = len("|user\n|\n|assistant\n|\n")  # a bar marks a special token
    assert account["tokens"] == sum(around + len(row["instruction"]) + len(row["output"]) for row in rows)
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_steps_without_a_buffer_are_those_of_the_tables(world, tmp_path):
    """24 rows in the order of the file: as long as the first pass goes, streaming changes nothing."""
    values = {**world, "disable_shuffling": True, "max_steps": 6, "save_strategy": "no"}
    streamed = luthier.train({**values, "output_dir": str(tmp_path / "streamed")})
    tables = luthier.train({**values, "streaming": False, "buffer_size": 16384, "output_dir": str(tmp_path / "tables")})
    assert losses(streamed) == losses(tables)


def test_rows_for_evaluation_from_the_stream_and_whole_ones(world, tmp_path):
    values = {**world, "do_eval": True, "eval_strategy": "steps", "eval_steps": 4}
    result = luthier.train({**values, "val_size": 5, "output_dir": str(tmp_path / "front")})
    counted = report(tmp_path / "front")
    assert counted["samples"] == {"eval": 5, "train": 32} and counted["datasets"]["numbers"]["rows_in"] == 37
    assert result.metrics["eval"]["eval_loss"] > 0
    luthier.train({**values, "eval_dataset": "tools", "output_dir": str(tmp_path / "whole")})
    assert report(tmp_path / "whole")["samples"] == {"eval": 24, "train": 32}


def test_fewer_rows_than_a_batch_are_filled_from_the_next_pass(world, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "d.json").write_text(json.dumps([{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]))
    (data / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "d.json"}}))
    keys = {"dataset": "d", "dataset_dir": str(data), "max_steps": 2, "output_dir": str(tmp_path / "out")}
    luthier.train({**world, **keys, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 1})
    assert report(tmp_path / "out")["datasets"]["d"]["rows_in"] == 10


@pytest.mark.parametrize("num_workers", representatives([0, 2], 0))
def test_a_file_that_breaks_off_stops_the_run_with_the_place(world, tmp_path, num_workers):
    data = tmp_path / "data"
    data.mkdir()
    rows = [json.dumps({"instruction": f"question {number}", "output": "b"}) for number in range(1000)]
    (data / "d.json").write_text("[" + ",\n".join(rows))
    (data / "dataset_info.json").write_text(json.dumps({"d": {"file_name": "d.json"}}))
    keys = {"dataset": "d", "dataset_dir": str(data), "max_steps": 3000, "output_dir": str(tmp_path / "out")}
    keys |= {"dataloader_num_workers": num_workers, "preprocessing_batch_size": 100, "save_strategy": "no"}
    with pytest.raises(DataError) as fault:
        luthier.train({**world, **keys, "per_device_train_batch_size": 64, "buffer_size": 64})
    assert "d.json: line 1000" in str(fault.value) and "it was cut off" in str(fault.value)
    assert "Traceback" not in str(fault.value)


def test_resuming_with_other_rows_is_a_warning(world, tmp_path, capsys):
    values = {**world, "output_dir": str(tmp_path / "out")}
    luthier.train({**values, "max_steps": 4})
    capsys.readouterr()
    luthier.train({**values, "buffer_size": 9, "dataloader_num_workers": 1})
    said = capsys.readouterr().err
    assert "resuming with another number of processes or workers and another row order" in said


@pytest.mark.thorough
def test_two_processes_share_the_rows(world, tmp_path):
    """Without a buffer they see together what one process sees with the doubled batch; the accounts are joined."""
    values = {**world, "disable_shuffling": True, "max_steps": 6}
    alone = luthier.train({**values, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "alone")})
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump({**values, "output_dir": str(tmp_path / "two")}))
    environment = {**os.environ, "FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "luthier", "train", str(run_file)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    state = json.loads((tmp_path / "two" / "trainer_state.json").read_text())
    told = [logs["loss"] for logs in state["log_history"] if "loss" in logs]
    assert told[:3] == pytest.approx(losses(alone)[:3], abs=1e-5), "24 rows are the first pass"
    counted = report(tmp_path / "two")
    assert counted["datasets"]["numbers"]["rows_in"] == 48 == counted["samples"]["train"]
    assert done.stderr.count("rows drawn so far") == 1


def test_looking_at_the_first_rows_of_a_stream(world, tmp_path, capsys):
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(world))
    assert main(["data", str(run_file), "--limit", "3", "--json"]) == 0
    captured = capsys.readouterr()
    assert len([json.loads(line) for line in captured.out.splitlines()]) == 3
    assert "data numbers: 3 rows drawn so far = 3 kept + 0 dropped" in captured.err
    assert main(["data", str(run_file), "--limit", "0"]) == 0
    assert capsys.readouterr().out.count("--- train row") == 24
    assert main(["data", str(run_file), "--row", "2", "--html", str(tmp_path / "page.html")]) == 0
    assert "1 of 3 train rows" in (tmp_path / "page.html").read_text()
