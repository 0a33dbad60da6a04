"""The state of a run follows from its files, however broken they are."""

import json
import os
import platform
import time
from datetime import datetime
from pathlib import Path

import pytest

from luthier.webui.identity import mark_of
from luthier.webui.runs import FRESH_SECONDS, SILENT_SECONDS, files_in, find_runs, last_line, read_run

OURS = {"argv": [], "pid": os.getpid(), "mark": mark_of(os.getpid()), "host": platform.node(), "started": 5.0}


def run_folder(folder: Path, log_age: float = 0.0, **files: object) -> Path:
    """`files`: name without suffix -> JSON value, or text that is written as it is."""
    folder.mkdir(parents=True)
    names = {"log": "trainer_log.jsonl", "run_file": "board.yaml"}
    for name, value in files.items():
        path = folder / names.get(name, f"{name}.json")
        path.write_text(value if isinstance(value, str) else json.dumps(value), "utf-8")
        os.utime(path, (time.time() - log_age,) * 2)
    return folder


@pytest.mark.parametrize(
    ("files", "state"),
    [
        ({"board": OURS}, "running"),
        ({"board": OURS, "stop": {}}, "stopping"),
        ({"board": {**OURS, "mark": "of the process that had this number before"}}, "lost"),
        ({"board": OURS, "exit": {"status": 0}}, "done"),
        ({"board": OURS, "exit": {"status": 0}, "stop": {}}, "done"),
        ({"board": OURS, "exit": {"status": 130}}, "stopped"),
        ({"board": OURS, "exit": {"status": 1}}, "failed"),
        ({"board": OURS, "exit": {"status": -9}}, "failed"),
        ({"board": OURS, "exit": {"status": -9}, "stop": {}}, "stopped"),
        ({"board": OURS, "exit": '{"stat'}, "running"),
        ({"board": '{"pid": 1'}, "lost"),
        ({"board": "[" * 9999}, "lost"),
        ({"board": {**OURS, "pid": "1"}}, "lost"),
        ({"run_file": "stage: sft"}, "starting"),
        ({"board": {**OURS, "host": "elsewhere"}}, "lost"),
        ({"board": {**OURS, "host": "elsewhere"}, "log": "{}\n"}, "running"),
        ({"board": {**OURS, "host": "elsewhere"}, "log": "{}\n", "exit": {"status": 0}}, "done"),
        ({"log": "{}\n"}, "running"),
        ({"log": "{}\n", "log_age": 2 * FRESH_SECONDS}, "unfinished"),
        ({"log": "{}\n", "all_results": {}, "log_age": 2 * FRESH_SECONDS}, "done"),
        ({"run_file": "stage: sft", "log_age": 2 * FRESH_SECONDS}, "lost"),
    ],
)
def test_the_state_in_a_word(tmp_path, files, state):
    now = time.time()
    assert read_run(run_folder(tmp_path / "run", **files), now).state == state


@pytest.mark.parametrize(
    ("files", "age", "is_silent"),
    [
        ({"board": OURS}, 2 * SILENT_SECONDS, True),
        ({"board": OURS}, SILENT_SECONDS / 2, False),
        ({"board": OURS, "exit": {"status": 0}}, 2 * SILENT_SECONDS, False),
        ({"board": {**OURS, "started": 4e9}}, 2 * SILENT_SECONDS, False),
    ],
    ids=["silent", "it beats", "it has ended", "that of an earlier start"],
)
def test_a_live_run_without_a_heartbeat(tmp_path, files, age, is_silent):
    folder, now = run_folder(tmp_path / "run", **files, heartbeat={}), time.time()
    os.utime(folder / "heartbeat.json", (now - age,) * 2)
    assert read_run(folder, now).silent_since == pytest.approx(now - age if is_silent else 0)


def test_a_run_of_a_terminal_whose_steps_are_long(tmp_path):
    folder = run_folder(tmp_path / "run", log="{}\n", log_age=2 * FRESH_SECONDS)
    (folder / "heartbeat.json").write_text("{}")
    assert read_run(folder).state == "running"


def test_a_run_of_another_machine_says_where_and_cannot_be_reached(tmp_path):
    run = read_run(run_folder(tmp_path / "run", board={**OURS, "host": "elsewhere"}, log="{}\n"))
    assert run.host == "elsewhere" and not run.is_ours


def test_runs_are_found_at_any_depth_and_what_is_inside_one_is_not(tmp_path):
    run_folder(tmp_path / "saves" / "llama" / "one", board=OURS)
    run_folder(tmp_path / "two", log="{}\n", log_age=900)
    run_folder(tmp_path / "two" / "checkpoint-3", log="{}\n")
    run_folder(tmp_path / ".hidden", log="{}\n")
    (tmp_path / "data").mkdir()
    assert [run.name for run in find_runs(tmp_path)] == ["one", "two"]
    assert find_runs(tmp_path / "absent") == []


def test_the_last_whole_line_is_read(tmp_path):
    path = tmp_path / "log"
    assert last_line(path) == {}
    path.write_text('{"current_steps": 1}\n{"current_steps": 2}\n{"current_st', "utf-8")
    assert last_line(path) == {"current_steps": 2}
    path.write_text('{"current_steps": 2, "loss": 1.5}\n{"current_steps": 2, "train_loss": 2}\n', "utf-8")
    assert last_line(path) == {"current_steps": 2, "train_loss": 2, "loss": 1.5}
    path.write_text(f'{{"pad": "{"x" * 9000}"}}\n{{"a": 1}}\nnull\n', "utf-8")
    assert last_line(path) == {"a": 1}


def test_five_hundred_runs_are_listed(tmp_path):
    lines = "".join(json.dumps({"current_steps": step, "loss": 1.0}) + "\n" for step in range(200))
    for number in range(500):
        run_folder(tmp_path / f"run-{number}", board=OURS, exit={"status": 0}, log=lines)
    assert len(find_runs(tmp_path)) == 500


def test_files_that_go_while_they_are_listed_are_left_out(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-4").mkdir()
    for name in ("a.json", "checkpoint-4/b.bin", "checkpoint-4/c.bin"):
        (tmp_path / name).write_text(name)
    stat = Path.stat

    def going(path, **how):
        if path.name == "b.bin":
            path.unlink()
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", going)
    assert files_in(tmp_path) == [("a.json", 6), ("checkpoint-4/c.bin", 18)]


ODD = [
    "null",
    "true",
    '"x"',
    "[]",
    "{}",
    "NaN",
    "Infinity",
    "-1",
    "1e308",
    "1" * 400,
    "1" * 5000,
    '"\\ud800"',
    "[" * 9999,
]


@pytest.mark.parametrize("value", ODD, ids=lambda value: value[:12])
def test_odd_values_in_the_files_of_one_run_do_not_hide_the_others(tmp_path, value):
    run_folder(tmp_path / "good", log='{"loss": 2.5}\n')
    names = {"board": ("pid", "mark", "host", "started"), "exit": ("status", "ended"), "stop": ("asked",)}
    files = {name: "{" + ",".join(f'"{key}": {value}' for key in keys) + "}" for name, keys in names.items()}
    log = f'{{"current_steps": {value}, "total_steps": {value}, "loss": {value}}}\n'
    run_folder(tmp_path / "odd", log=log, **files)
    found = {run.name: run for run in find_runs(tmp_path)}
    assert set(found) == {"good", "odd"} and found["good"].last == {"loss": 2.5}
    odd = found["odd"]
    for seconds in (odd.started, odd.ended):
        datetime.fromtimestamp(seconds)
    json.dumps([odd.host, dict(odd.last)], ensure_ascii=False).encode()


def test_a_name_that_is_not_utf8_is_passed_over_and_named_once(tmp_path, said):
    run_folder(tmp_path / "good", log="{}\n")
    run_folder(tmp_path / os.fsdecode(b"caf\xe9"), log="{}\n")
    (tmp_path / "good" / os.fsdecode(b"b\xe9")).touch()
    for _ in range(2):
        assert [run.name for run in find_runs(tmp_path)] == ["good"]
    assert "\n".join(said).count(r"caf\xe9': is not shown, since its name is not UTF-8") == 1
    assert [name for name, _ in files_in(tmp_path / "good")] == ["b\ufffd", "trainer_log.jsonl"]


def test_results_that_are_older_than_the_log_are_those_of_an_earlier_start(tmp_path):
    """A finished run was resumed for more steps, and killed."""
    now = time.time()
    folder = run_folder(tmp_path / "run", all_results={}, log="{}\n")
    os.utime(folder / "all_results.json", (now - 900, now - 900))
    os.utime(folder / "trainer_log.jsonl", (now - 600, now - 600))
    assert read_run(folder, now).state == "unfinished"
