"""SIGTERM and Ctrl-C at every part of a run: it ends in time, and goes on later as if nothing had been."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.core.manifest import verify_folder
from luthier.data.rows import maker
from luthier.training.callbacks import interrupt
from luthier.training.callbacks.interrupt import StopOnSignal
from luthier.training.callbacks.progress import ProgressBar
from luthier.training.checkpoints.store import checkpoints_in
from luthier.training.trainer import StageTrainer
from tests import killable
from tests.matrix import representatives
from tests.small_world import losses, small_world

SLOW_SECONDS = 600
"""How long a step would take that is given up."""
END_SECONDS = 300
"""After which a process that does not end has a fault."""
EVALUATED = {"val_size": 8, "per_device_eval_batch_size": 1, "eval_strategy": "steps", "eval_steps": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {
        **small_world(tmp_path_factory.mktemp("world")),
        "finetuning_type": "lora",
        "lora_dropout": 0.1,
        "disable_shuffling": False,
        "overwrite_output_dir": False,
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "cosine",
        "max_steps": 6,
    }


def assert_same_end(out: Path, whole: Path) -> None:
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, out))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    logs = [(folder / "trainer_log.jsonl").read_text().splitlines() for folder in (whole, out)]
    timing = ("elapsed_time", "remaining_time", "throughput")
    lines = [[{k: v for k, v in json.loads(line).items() if k not in timing} for line in log] for log in logs]
    assert [line for line in lines[1] if "train_loss" not in line] == [
        line for line in lines[0] if "train_loss" not in line
    ]
    assert {path.name for path in out.iterdir()} == {path.name for path in whole.iterdir()}


def signal_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int, *, then: Callable[[], Any]) -> None:
    """SIGTERM to this process before call number `count` of a method, from 1."""
    call, calls = getattr(owner, name), []

    def counted(self: Any, *arguments: Any, **more: Any) -> Any:
        calls.append(name)
        if len(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
            then()
        return call(self, *arguments, **more)

    monkeypatch.setattr(owner, name, counted)


@pytest.mark.parametrize("best", [{}, {"load_best_model_at_end": True, "learning_rate": 1e-3}], ids=["last", "best"])
def test_an_evaluation_is_given_up_and_made_up_for(world, tmp_path, monkeypatch, said, best):
    """The second evaluation, in its fourth batch of eight."""
    keys = {**world, **EVALUATED, **best}
    luthier.train({**keys, "output_dir": str(tmp_path / "whole")})
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        signal_at(patch, ProgressBar, "on_prediction_step", 8 + 4, then=lambda: None)
        result = luthier.train({**keys, "output_dir": str(out)})
    assert result.was_interrupted and not list(out.glob("*.safetensors"))
    assert "the evaluation at step 4 is made up for when the run is resumed" in said
    assert {folder.name for folder in checkpoints_in(out)} == {"checkpoint-2", "checkpoint-4"}
    resumed = luthier.train({**keys, "output_dir": str(out)})
    assert [logs["step"] for logs in resumed.log_history if "eval_loss" in logs] == [2, 4, 6]
    assert_same_end(out, tmp_path / "whole")


LAYOUTS: dict[str, dict[str, Any]] = {
    "sft accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "sft streamed": {"streaming": True, "buffer_size": 7},
    "kto": {"stage": "kto", "dataset": "feedback", "learning_rate": 1e-3, "lora_dropout": 0.0},
}


@pytest.mark.parametrize("first", [False, True], ids=["within an epoch", "its first step"])
@pytest.mark.parametrize("layout", representatives(LAYOUTS, "sft streamed"))
def test_a_step_that_takes_too_long_is_given_up(world, tmp_path, monkeypatch, said, layout, first):
    """Step 4, or step 7, which is the first of the second epoch. The checkpoint is that of the step before."""
    keys = {**world, **LAYOUTS[layout], "max_steps": 8, "save_steps": 20}
    luthier.train({**keys, "output_dir": str(tmp_path / "whole")})
    out, step = tmp_path / "out", 7 if first else 4
    per_step = keys.get("gradient_accumulation_steps", 1)
    ended: list[bool] = []
    with monkeypatch.context() as patch:
        # In the last batch of the step, when the others have left their gradients.
        signal_at(
            patch,
            StageTrainer,
            "compute_loss",
            step * per_step,
            then=lambda: ended.append(not time.sleep(SLOW_SECONDS)),
        )
        result = luthier.train({**keys, "save_on_signal_seconds": 1, "output_dir": str(out)})
    assert result.was_interrupted and not ended
    assert [folder.name for folder in checkpoints_in(out)] == [f"checkpoint-{step - 1}"]
    assert any("the checkpoint is complete " in line and " s after the signal" in line for line in said)
    resumed = luthier.train({**keys, "output_dir": str(out)})
    assert len(losses(resumed)) == 8
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    if "streaming" in keys:
        assert (out / "data_report.json").read_text() == (tmp_path / "whole" / "data_report.json").read_text()


def test_a_step_is_finished_if_there_is_time(world, tmp_path, monkeypatch):
    signal_at(monkeypatch, StageTrainer, "compute_loss", 3, then=lambda: None)
    keys = {**world, "save_on_signal_seconds": 600, "output_dir": str(tmp_path / "out")}
    assert luthier.train(keys).was_interrupted
    assert "checkpoint-3" in os.listdir(tmp_path / "out")


def test_an_epoch_that_a_signal_cuts_short_does_not_end(world, tmp_path, monkeypatch):
    """Its line of the log and its evaluation are those of the resumed run. An epoch has four steps."""
    by_epoch = {"eval_strategy": "epoch", "logging_strategy": "epoch", "save_strategy": "epoch", "save_steps": 500}
    keys = {**world, **EVALUATED, **by_epoch, "max_steps": 8}
    whole = luthier.train({**keys, "output_dir": str(tmp_path / "whole")})
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        signal_at(patch, StageTrainer, "compute_loss", 3, then=lambda: None)
        stopped = luthier.train({**keys, "output_dir": str(out)})
    assert stopped.was_interrupted and not any("eval_loss" in logs for logs in stopped.log_history)
    resumed = luthier.train({**keys, "output_dir": str(out)})
    steps = [[logs["step"] for logs in run.log_history if "eval_loss" in logs] for run in (whole, resumed)]
    assert steps == [[4, 8], [4, 8]]
    assert losses(resumed) == losses(whole)


def test_a_save_that_takes_longer_than_there_is_time_is_told(said, monkeypatch):
    stop = StopOnSignal(2.0)
    stop.note_save(3.0)
    stop.note_save(3.0)
    (warning,) = said
    assert warning.startswith("warning: save_on_signal_seconds: 2: this checkpoint took 3.0 s, so none can be complete")
    monkeypatch.setattr(interrupt, "time", SimpleNamespace(monotonic=lambda: 105.0))
    stop.has_signal, stop.signal_time = True, 100.0
    stop.note_save(1.0)
    assert "the checkpoint is complete 5.0 s after the signal, later than save_on_signal_seconds: 2 -> " in said[-1]


def test_the_time_that_a_save_needs_is_kept_free(monkeypatch):
    """10 s, of which the longest save so far takes 2 s, and a half more for safety; of the first save half of it."""
    timers: list[float] = []
    monkeypatch.setattr(signal, "setitimer", lambda which, seconds: timers.append(seconds))
    for longest in (None, 2.0):
        stop = StopOnSignal(10.0)
        stop.longest_save_seconds, stop.process = longest, os.getpid()
        stop.handle(signal.SIGTERM, None)
    assert timers == [5.0, 7.0]


def test_a_run_whose_training_has_ended_is_saved_and_described(world, tmp_path, monkeypatch, said):
    out = tmp_path / "out"
    signal_at(monkeypatch, StageTrainer, "save_final", 1, then=lambda: None)
    result = luthier.train({**world, "val_size": 8, "do_eval": True, "output_dir": str(out)})
    assert result.was_interrupted and "eval" not in result.metrics
    assert verify_folder(out) == [] and (out / "adapter_model.safetensors").is_file()
    assert f"stopped: training had ended, and its weights are saved in {out}" in said


def test_nothing_is_left_of_a_run_that_has_not_made_a_step(world, tmp_path, monkeypatch, said):
    keys = {**world, **EVALUATED, "eval_on_start": True, "output_dir": str(tmp_path / "out")}
    signal_at(monkeypatch, ProgressBar, "on_prediction_step", 3, then=lambda: None)
    assert luthier.train(keys).was_interrupted
    assert not checkpoints_in(tmp_path / "out")
    assert "stopped: no step has ended, so nothing is saved -> run the same command to start again" in said


# -- real processes ----------------------------------------------------------------------------------


def gets_signals(number: int, count: int = 1, *, group: bool = False) -> None:
    """This process gets them, or all of its group do."""
    for _ in range(count):
        os.killpg(os.getpgid(0), number) if group else os.kill(os.getpid(), number)


def gets_signals_while_it_tokenizes(number: int, count: int) -> None:
    killable.at_call(maker, "turn_ids", 2, partial(gets_signals, number, count))


@pytest.fixture
def many_rows(world, tmp_path) -> dict[str, Any]:
    """Rows of several batches."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"instruction": f"Say {number}", "output": f"{number} " * 100} for number in range(20_000)]
    (data / "many.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"many": {"file_name": "many.json"}}))
    return {**world, "dataset": "many", "dataset_dir": str(data), "output_dir": str(tmp_path / "out")}


@pytest.mark.parametrize(
    ("number", "count"),
    representatives([(signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGINT, 1)], (signal.SIGTERM, 1)),
)
def test_a_signal_while_data_are_prepared(many_rows, tmp_path, number, count):
    """When the second batch of rows is tokenized."""
    log = tmp_path / "log"
    changes = partial(gets_signals_while_it_tokenizes, number, count)
    process = killable.start(many_rows, log, command="train", changes=changes)
    process.join(END_SECONDS)
    assert process.exitcode == 130 or (count == 2 and process.exitcode == -number)
    said = log.read_text()
    assert "data many" not in said, "it was not in the middle of it"
    assert "Traceback" not in said and (said.endswith("luthier: interrupted\n") or count == 2)
    if count == 1:
        assert os.listdir(tmp_path / "out") == []


@pytest.mark.thorough
def test_two_processes_give_up_an_evaluation_together(world, tmp_path):
    """One of them gets the signal, in the first evaluation, of 150 batches each, before the tenth."""
    data, log, out = tmp_path / "data", tmp_path / "log", tmp_path / "out"
    shutil.copytree(world["dataset_dir"], data)
    info = json.loads((data / "dataset_info.json").read_text()) | {"many": {"file_name": "many.json"}}
    (data / "dataset_info.json").write_text(json.dumps(info))
    (data / "many.json").write_text(json.dumps([{"instruction": f"Say {n}", "output": str(n)} for n in range(300)]))
    keys = {**world, **EVALUATED, "max_steps": 2, "eval_steps": 1, "dataset_dir": str(data), "output_dir": str(out)}
    keys = {name: value for name, value in keys.items() if name != "val_size"} | {"eval_dataset": "many"}
    batch = partial(killable.at_call, ProgressBar, "on_prediction_step", 10, partial(gets_signals, signal.SIGTERM))
    process = killable.start(keys, log, 2, changes=batch)
    process.join(END_SECONDS)
    assert process.exitcode == 0 and "the evaluation at step 1 is made up for" in log.read_text(), log.read_text()
    assert [folder.name for folder in checkpoints_in(out)] == ["checkpoint-1"]
    assert verify_folder(out / "checkpoint-1") == []
    process = killable.start(keys, log, 2)
    process.join(END_SECONDS)
    assert process.exitcode == 0 and f"resuming from {out / 'checkpoint-1'}" in log.read_text(), log.read_text()
    state = json.loads((out / "trainer_state.json").read_text())
    assert [logs["step"] for logs in state["log_history"] if "eval_loss" in logs] == [1, 2]


@pytest.mark.thorough
def test_ctrl_c_that_the_workers_of_the_loader_get_too(world, tmp_path):
    """A terminal sends it to the whole group. The workers serve their process until it has saved and ends."""
    log, out = tmp_path / "log", tmp_path / "out"
    keys = {**world, "dataloader_num_workers": 2, "output_dir": str(out)}
    luthier.train({**keys, "max_steps": 40, "save_strategy": "no", "output_dir": str(tmp_path / "whole")})
    pressed = partial(gets_signals, signal.SIGINT, group=True)
    step = partial(killable.at_call, StageTrainer, "training_step", 3, pressed)
    process = killable.start({**keys, "max_steps": 40, "save_steps": 100}, log, changes=step)
    process.join(END_SECONDS)
    assert process.exitcode == 0 and "Traceback" not in log.read_text(), log.read_text()
    (saved,) = checkpoints_in(out)
    assert verify_folder(saved) == [] and not (out / "adapter_model.safetensors").exists()
    luthier.train({**keys, "max_steps": 40, "save_strategy": "no"})
    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "whole", out))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_training_in_another_thread_leaves_signals_to_the_main_thread(world, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    keys = {**world, "max_steps": 2, "save_strategy": "no"}
    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(luthier.train, {**keys, "output_dir": str(tmp_path / "thread")}).result()
    assert losses(result) == losses(luthier.train({**keys, "output_dir": str(tmp_path / "main")}))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == handlers
