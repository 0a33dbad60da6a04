"""What is told of a run whose processes failed."""

import json
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from luthier.workflow.launch.failed_processes import SHOWN_LINES, FailedProcesses


@pytest.fixture
def attempt(tmp_path) -> Path:
    """The log folders of two processes in their third start; those of the first start are older."""
    for number in (0, 10, 2):
        for rank in (0, 1):
            (tmp_path / "job_x" / f"attempt_{number}" / str(rank)).mkdir(parents=True)
    return tmp_path / "job_x" / "attempt_10"


def failure(local_rank: int, exitcode: int) -> ProcessFailure:
    return ProcessFailure(local_rank=local_rank, pid=7, exitcode=exitcode, error_file="<none>")


def note(folder: Path, place: str, lost_peer: bool = False) -> None:
    (folder / "place.json").write_text(json.dumps({"place": place, "lost_peer": lost_peer, "time": 0.0}))


def test_a_killed_process_is_named_with_its_log_and_the_places_of_all(attempt, tmp_path):
    (attempt / "1" / "stderr.log").write_text("".join(f"line {number}\n" for number in range(20)))
    note(attempt / "0", "all_reduce, called at luthier/training/trainer.py:5 (log)", lost_peer=True)
    note(attempt / "1", "backward")
    failed = FailedProcesses({4: failure(0, 1), 5: failure(1, -9)}, tmp_path)
    told = list(failed.report())
    assert told[0] == "rank 5 was ended by SIGKILL (process 1 of this machine, pid 7)"
    assert told[1 : SHOWN_LINES + 1] == [f"  | line {number}" for number in range(20 - SHOWN_LINES, 20)]
    assert told[SHOWN_LINES + 1 :] == [
        f"  its log: {attempt / '1' / 'stderr.log'}",
        "  process 0 of this machine was in all_reduce, called at luthier/training/trainer.py:5 (log)",
        "  process 1 of this machine was in backward",
    ]
    assert failed.status == 1


def test_who_has_lost_another_process_is_not_the_first_to_fail(attempt, tmp_path):
    (attempt / "1" / "stderr.log").write_text("luthier: out of memory\n")
    note(attempt / "0", "all_reduce", lost_peer=True)
    note(attempt / "1", "backward")
    failed = FailedProcesses({0: failure(0, 1), 1: failure(1, 1)}, tmp_path)
    assert failed.culprit == 1
    assert list(failed.report())[:2] == [
        "rank 1 ended with status 1 (process 1 of this machine, pid 7)",
        "  | luthier: out of memory",
    ]


@pytest.mark.parametrize(("exitcode", "local_rank"), [(2, 1), (130, 1), (1, 0), (2, 0)])
def test_what_the_terminal_shows_is_not_told_twice(attempt, tmp_path, exitcode, local_rank):
    failed = FailedProcesses({local_rank: failure(local_rank, exitcode)}, tmp_path)
    assert list(failed.report()) == []
    assert failed.status == exitcode


@pytest.mark.parametrize("status", [2, 130])
@pytest.mark.parametrize("told", [0, 1])
def test_who_is_ended_by_torchrun_is_not_the_first_to_fail(attempt, tmp_path, status, told):
    """The run file names a module that does not exist: one process says so, and torchrun ends the other."""
    failed = FailedProcesses({told: failure(told, status), 1 - told: failure(1 - told, -signal.SIGTERM)}, tmp_path)
    assert failed.culprit == told and failed.status == status and list(failed.report()) == []


def test_processes_that_have_left_no_log(tmp_path):
    failed = FailedProcesses({1: failure(1, -11)}, tmp_path)
    assert list(failed.report()) == ["rank 1 was ended by SIGSEGV (process 1 of this machine, pid 7)"]
