"""Runs are started, stopped, resumed and deleted; nobody else's process or folder is touched."""

import json
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from luthier.core.errors import InvalidInput, OutputError
from luthier.core.manifest import verify_folder
from luthier.webui import process
from luthier.webui.identity import mark_of
from luthier.webui.runs import Run, read_run
from luthier.webui.watch import Curves, console_end
from tests.small_world import small_world
from tests.waiting import until


def wait_until(is_so: Callable[[], bool], folder: Path) -> None:
    until(is_so, lambda: console_end(folder / "console.log"))


def ended(folder: Path) -> Run:
    wait_until(lambda: not read_run(folder).is_live, folder)
    return read_run(folder)


@pytest.mark.thorough
def test_a_run_is_stopped_with_a_checkpoint_resumed_and_killed(tmp_path):
    folder = tmp_path / "out"
    values = small_world(tmp_path) | {"max_steps": 100_000, "output_dir": str(folder)}
    text = "# as it was written\n" + yaml.safe_dump(values)
    assert process.start(folder, text).state == "running"
    with pytest.raises(OutputError, match="a run is going on"):
        process.start(folder, text)
    with pytest.raises(OutputError, match="stop it first"):
        process.delete(read_run(folder), tmp_path)
    wait_until(lambda: bool(read_run(folder).last), folder)
    process.stop(read_run(folder))
    run = ended(folder)
    assert (run.state, run.status) == ("stopped", 130)
    (saved,) = folder.glob("checkpoint-*")
    assert verify_folder(saved) == []
    assert (folder / "board.yaml").read_text("utf-8") == text

    process.resume(run)
    step = int(saved.name.removeprefix("checkpoint-"))
    wait_until(lambda: read_run(folder).last.get("current_steps", 0) > step, folder)
    process.kill(read_run(folder))
    assert ended(folder).state == "stopped"
    curves = Curves(folder / "trainer_log.jsonl")
    curves.read()
    assert [number for number, _ in curves.curve("loss")[:step]] == list(range(1, step + 1))

    process.delete(read_run(folder), tmp_path)
    assert not folder.exists()


def test_a_run_that_dies_at_once_says_why(tmp_path):
    folder = tmp_path / "out"
    process.start(folder, "stage: sft\nlearning_rat: 1\n")
    run = ended(folder)
    assert (run.state, run.status) == ("failed", 2)
    assert "did you mean learning_rate" in console_end(folder / "console.log")


def test_what_is_resumed_is_the_command_that_was_started(tmp_path):
    folder = tmp_path / "out"
    for begin in (lambda: process.start(folder, "export_di: 1\n", "export"), lambda: process.resume(read_run(folder))):
        begin()
        assert ended(folder).status == 2
    console = console_end(folder / "console.log")
    assert console.count("did you mean export_dir") == 2 and console.count("$ luthier export") == 2


def test_only_a_folder_of_a_run_inside_the_root_is_deleted(tmp_path):
    root = tmp_path / "root"
    outside, inside = tmp_path / "outside", root / "inside"
    for folder in (outside, inside):
        folder.mkdir(parents=True)
        (folder / "exit.json").write_text('{"status": 0}', "utf-8")
    (outside / "board.yaml").write_text("stage: sft", "utf-8")
    (root / "link").symlink_to(outside)
    for folder in (outside, root, root / "link", root / "inside" / ".." / ".." / "outside"):
        with pytest.raises(OutputError, match="is not inside"):
            process.delete(read_run(folder), root)
    with pytest.raises(OutputError, match="holds no run"):
        process.delete(read_run(inside), root)
    assert outside.exists() and inside.exists()


def test_a_run_of_a_terminal_is_left_to_it(tmp_path):
    (tmp_path / "trainer_log.jsonl").write_text("{}\n", "utf-8")
    for act in (process.stop, process.kill):
        with pytest.raises(InvalidInput, match="was started in a terminal"):
            act(read_run(tmp_path))
    with pytest.raises(InvalidInput, match="no run file"):
        process.resume(read_run(tmp_path))


def test_a_process_that_only_got_the_number_of_a_run_is_left_alone(tmp_path):
    """The number of this very process, noted down by a run of an earlier start of the machine."""
    record = {"argv": [], "pid": os.getpid(), "mark": "of an earlier start", "host": platform.node(), "started": 1.0}
    (tmp_path / "board.json").write_text(json.dumps(record), "utf-8")
    run = read_run(tmp_path)
    assert run.state == "lost"
    process.stop(run)
    process.kill(run)  # this process would not come further


def test_a_run_of_another_machine_is_left_to_it(tmp_path):
    record = {"argv": [], "pid": os.getpid(), "mark": mark_of(os.getpid()), "host": "elsewhere", "started": 1.0}
    (tmp_path / "board.json").write_text(json.dumps(record), "utf-8")
    (tmp_path / "trainer_log.jsonl").write_text("{}\n", "utf-8")
    for act in (process.stop, process.kill):
        with pytest.raises(InvalidInput, match="runs on elsewhere -> stop it there"):
            act(read_run(tmp_path))
    with pytest.raises(OutputError, match="a run is going on"):
        process.start(tmp_path, "stage: sft")


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(OutputError, match="cannot be created"):
        process.start(tmp_path / "file" / "out", "stage: sft")
    shutil.rmtree(tmp_path)
