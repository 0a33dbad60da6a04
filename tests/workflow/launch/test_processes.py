"""What several processes may not do is told before they start, in the words of `luthier train`."""

import json
import os
import re

import pytest

from luthier import cli
from luthier.config.load import load_train
from luthier.config.rules.table import all_rules
from luthier.workflow.launch.processes import in_one_of, num_processes_asked
from tests.small_world import small_world

ALONE = {
    "use_badam": {"use_badam": True},
    "galore_layerwise": {"use_galore": True, "galore_target": "all", "galore_layerwise": True},
    "apollo_layerwise": {"use_apollo": True, "apollo_target": "all", "apollo_layerwise": True},
}
"""Key -> what a run has that only one process can train."""


@pytest.fixture
def run_file(tmp_path):
    """Writes the small world with some keys and returns the path of its run file."""

    def write(**keys):
        path = tmp_path / "run.json"
        path.write_text(json.dumps({**small_world(tmp_path), **keys}), encoding="utf-8")
        return str(path)

    return write


def told(capsys, *words: str) -> tuple[int, str]:
    """Exit status and stderr."""
    capsys.readouterr()
    status = cli.main(list(words))
    return status, capsys.readouterr().err


def refused_by_train(capsys, monkeypatch, path: str, num_processes: int) -> str:
    """What each of the processes that torchrun has started says."""
    with monkeypatch.context() as environment:
        environment.setenv("WORLD_SIZE", str(num_processes))
        environment.setenv("LOCAL_RANK", "0")
        status, words = told(capsys, "train", path)
    assert status == 2
    return words


def test_these_are_all_rules_about_several_processes():
    """A rule that reads WORLD_SIZE is one of those tested here."""
    reads = {rule.keys[0] for rule, _, _ in all_rules() if "NPROC_PER_NODE=1" in rule.remedy}
    assert reads == set(ALONE)


@pytest.mark.parametrize("key", ALONE)
def test_plan_and_check_refuse_what_train_refuses(run_file, capsys, monkeypatch, key):
    path = run_file(**ALONE[key])
    expected = refused_by_train(capsys, monkeypatch, path, 2)
    assert re.search(rf"run\.json:\d+: {key}: ", expected)
    assert told(capsys, "plan", path, "--processes", "2") == (2, expected)
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    assert told(capsys, "plan", path) == (2, expected)
    status, words = told(capsys, "check", path)
    assert status == 2 and expected.endswith(words)  # check prints warnings on stdout
    monkeypatch.delenv("NPROC_PER_NODE")
    assert told(capsys, "check", path)[0] == 0


def test_plan_refuses_a_batch_of_all_processes_that_there_are_no_rows_for(run_file, capsys):
    """As the trainer does: 24 rows are no batch of 8 processes with 4 rows each."""
    path = run_file(dataloader_drop_last=True)
    status, words = told(capsys, "plan", path, "--processes", "8")
    assert status == 2 and "dataloader_drop_last: 24 rows are fewer than a batch, which has 32" in words
    assert told(capsys, "plan", path, "--processes", "6")[0] == 0


def test_the_environment_says_how_many_processes_there_are(tmp_path):
    run = load_train(small_world(tmp_path))
    assert num_processes_asked(run, {"NPROC_PER_NODE": "8", "NNODES": "2"}) == 16
    assert num_processes_asked(run, {"NPROC_PER_NODE": "8", "NNODES": "1:4"}) == 32
    assert num_processes_asked(run, {"NPROC_PER_NODE": "gpu"}) is None and num_processes_asked(run, {}) is None
    assert num_processes_asked(run, {"USE_RAY": "1", "NPROC_PER_NODE": "8"}) == run.ray.ray_num_workers == 1


def test_the_environment_is_as_before_afterwards(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with in_one_of(3):
        assert os.environ["WORLD_SIZE"] == "3"
    assert "WORLD_SIZE" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "5")
    with in_one_of(3):
        pass
    assert os.environ["WORLD_SIZE"] == "5"
