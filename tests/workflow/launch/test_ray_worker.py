"""What a worker of Ray decides without Ray: whether another start can help, and where it goes on."""

import os
import sys
from types import SimpleNamespace

import pytest

from luthier.core.manifest import write_manifest
from luthier.workflow.launch.ray_worker import Child, Endings, environment_of, is_over, where_to_go_on


def test_a_crash_is_tried_again_and_an_error_of_all_is_not():
    endings = Endings(2)
    assert [endings.begin(rank) for rank in (0, 1)] == [(0, True), (0, True)]
    endings.end(0, 1, "a process of this run has ended", "")  # what the others say when one was killed
    assert endings.verdict() == "open"
    endings.end(1, -9, "", "")
    assert endings.verdict() == "again"
    assert [endings.begin(rank) for rank in (0, 1)] == [(1, True), (1, True)]
    endings.end(0, 1, "the loss became nan", "")
    assert endings.verdict() == "open"
    endings.end(1, 1, "the loss became nan", "")
    assert endings.verdict() == "over" and is_over(endings.verdict)
    assert endings.begin(0) == (2, False) and endings.result() == (1, "the loss became nan", "")


def test_wrong_input_of_one_is_final_and_so_is_a_wish_to_stop():
    endings = Endings(2)
    endings.begin(0)
    endings.end(0, 2, "dataset: no row is left", "")
    assert endings.begin(1) == (0, False) and endings.result()[0] == 2
    endings = Endings(1)
    endings.begin(0)
    endings.ask_to_stop()
    endings.end(1, 130, "", "")
    endings.end(0, 130, "stopped: checkpoint-3 is saved", "")
    assert (
        endings.asked() == 1
        and endings.result() == (130, "stopped: checkpoint-3 is saved", "")
        and endings.begin(0) == (1, False)
    )


def test_the_first_process_prints():
    endings = Endings(2)
    endings.end(1, 0, "", "no")
    endings.end(0, 0, "", "train_loss: 1\n")
    assert endings.result() == (0, "", "train_loss: 1\n")


def test_a_restart_goes_on_from_a_checkpoint_of_this_run(tmp_path):
    """And not from one that was there before, which the run was told to overwrite."""
    earlier = {}
    for step in (2, 4, 9):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text('{"global_step": 1}')
        if step != 4:
            write_manifest(folder)
        if step == 9:
            earlier[folder.name] = (folder / "manifest.json").stat().st_mtime_ns
    keys = {"output_dir": str(tmp_path), "overwrite_output_dir": True}
    assert where_to_go_on(keys, earlier) == {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    assert where_to_go_on({**keys, "overwrite_output_dir": False}, earlier) == {}  # it finds it itself
    named = {"output_dir": str(tmp_path), "resume_from_checkpoint": "elsewhere/checkpoint-1"}
    assert where_to_go_on(named, earlier) == {"resume_from_checkpoint": str(tmp_path / "checkpoint-2")}
    assert where_to_go_on({**named, "output_dir": str(tmp_path / "empty")}, {}) == {}


def test_the_variables_of_torchrun(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "4711")
    monkeypatch.setenv("USE_RAY", "1")
    numbers = {"world_rank": 5, "world_size": 8, "local_rank": 1, "local_world_size": 4}
    context = SimpleNamespace(**{f"get_{name}": (lambda number=number: number) for name, number in numbers.items()})
    found = environment_of({"HF_TOKEN": "x"}, context)
    expected = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "HF_TOKEN": "x"}
    expected |= {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4711"}
    expected |= {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // 4))}
    assert expected.items() <= found.items() and "USE_RAY" not in found


@pytest.mark.skipif(sys.platform != "linux", reason="the child ends with its parent on Linux")
def test_a_child_is_watched(tmp_path, capfd):
    child = Child(["trian"], os.environ, str(tmp_path))
    assert child.watch(lambda: 0) == 2
    assert child.error.startswith("unknown command `trian`") and "unknown command" in capfd.readouterr().err
    child = Child(["version"], os.environ, str(tmp_path / "not here"))
    assert child.watch(lambda: 0) == 0 and child.printed.startswith("luthier ") and child.error == ""
