"""The log has whole lines only, and says how long the rest takes."""

import json
import multiprocessing
import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.training.callbacks import trainer_log
from luthier.training.callbacks.trainer_log import TrainerLog, append_whole


class Clock:
    """The monotonic clock, which stands still until it is set."""

    seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


def state(step: int) -> Any:
    return SimpleNamespace(global_step=step, max_steps=100, is_world_process_zero=True)


def test_the_time_left_is_that_of_the_steps_since_the_resume(tmp_path, monkeypatch):
    """Resumed at step 40; 60 s are spent on reading again what was read, and two steps take 10 s. The other 58 take
    290 s."""
    clock = Clock()
    monkeypatch.setattr(trainer_log, "time", clock)
    log = TrainerLog(tmp_path / "trainer_log.jsonl", overwrites=False)
    log.on_train_begin(None, state(40), None)
    clock.seconds += 60
    for step in (40, 41):
        log.on_step_begin(None, state(step), None)
        clock.seconds += 5
    log.on_log(None, state(42), None, logs={"loss": 1.0})
    (line,) = map(json.loads, (tmp_path / "trainer_log.jsonl").read_text().splitlines())
    assert (line["elapsed_time"], line["remaining_time"]) == ("0:01:10", "0:04:50")


@pytest.mark.parametrize("before", [b"", b'{"a": 1}\n', b'{"a": 1}\n{"b": 2}\n'])
@pytest.mark.parametrize("half", [b"", b'{"c"', b"\0\0\0"])
def test_half_a_line_of_a_killed_process_goes(tmp_path, before, half):
    path = tmp_path / "log"
    path.write_bytes(before + half)
    append_whole(path, b'{"d": 4}\n')
    assert path.read_bytes() == before + b'{"d": 4}\n'


def _fill(path: Path) -> None:
    """In a process of its own: a file that may have 100 bytes is a disk that has so many left."""
    for stream in (1, 2):  # what it says may go to files that are longer
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    log = TrainerLog(path, overwrites=False)
    for _ in range(5):
        log._append(f"{LINE}\n")
    os._exit(0 if log.has_failed else 1)


LINE = '{"a": 12345678901234567890}'


def test_a_full_disk_takes_a_whole_line_or_none(tmp_path):
    path = tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(target=_fill, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == 0 and path.read_text() == f"{LINE}\n" * 3


def test_trackers_get_what_the_log_has(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    import luthier
    from tests.small_world import small_world

    keys = {**small_world(tmp_path / "world"), "report_to": "tensorboard", "max_steps": 3, "val_size": 4}
    keys |= {"eval_strategy": "steps", "eval_steps": 3, "logging_dir": str(tmp_path / "board")}
    luthier.train(keys)
    lines = [json.loads(line) for line in Path(keys["output_dir"], "trainer_log.jsonl").read_text().splitlines()]
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    scalars = events.Tags()["scalars"]
    for line in lines:
        for name in set(line) & {"loss", "eval_loss", "throughput", "grad_norm"}:
            tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
            assert tag in scalars
            found = {event.step: event.value for event in events.Scalars(tag)}
            assert found[line["current_steps"]] == pytest.approx(line[name])
