"""The disk of one process of several fails during a save: all of them go on without that checkpoint."""

import errno
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import yaml

import luthier
from luthier.training.checkpoints import shared_save
from luthier.training.checkpoints.shared_save import SharedSave
from luthier.training.checkpoints.store import NotSaved, fault_of
from tests.small_world import losses, small_world

FSDP = {"fsdp": True, "fsdp_config": {"fsdp_state_dict_type": "FULL_STATE_DICT"}}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": FSDP,
    "fsdp2_sharded_files": {"fsdp": True, "fsdp_config": {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}},
}
SMALL = "ddp-1-1000 fsdp2-0-600000"
LARGE = "ddp-0-100000 ddp-0-600000 fsdp2-0-100000 fsdp2-1-1000 fsdp2_sharded_files-1-10000"
"""Engine, rank and limit: too little for the random numbers, the weights (0.46 MB), the optimizer or a shard."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("world"))
    return {**values, "max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-3}


@pytest.mark.thorough
@pytest.mark.parametrize("cases", [SMALL, LARGE])
def test_a_full_disk_of_one_process_costs_one_checkpoint(world, tmp_path, cases):
    alone = luthier.train({**world, "save_strategy": "no", "output_dir": str(tmp_path / "alone")})
    files = []
    for case in cases.split():
        keys = {**world, **ENGINES[case.split("-")[0]], "per_device_train_batch_size": 2}
        files.append(tmp_path / f"{case}.yaml")
        files[-1].write_text(yaml.safe_dump({**keys, "output_dir": str(tmp_path / case)}))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "tests.runs.full_for_one", *map(str, files)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    for case in cases.split():
        out = tmp_path / case
        assert not (errors := [path.read_text() for path in tmp_path.glob(f"{case}.error*")]), errors
        assert f"cannot save to {out}/checkpoint-2: " in done.stderr
        found = sorted(out.glob("*checkpoint*"))
        assert [path.name for path in found] == ["checkpoint-1", "checkpoint-3"]
        assert [fault_of(path) for path in found] == [None, None]
        state = json.loads((out / "trainer_state.json").read_text())
        steps = [logs["loss"] for logs in state["log_history"] if "loss" in logs]
        assert steps == pytest.approx(losses(alone), abs=1e-5)
    assert done.stderr.count("; training goes on -> free some space before the next save") == len(files)


def test_a_process_alone_raises_the_fault_at_once():
    share = SharedSave()
    with pytest.raises(OSError, match="No space"), share.noting(), share.noting_in_libraries():
        assert torch.save is torch.serialization.save
        raise OSError(errno.ENOSPC, "No space left on device")
    share.agree()


def test_one_of_several_goes_on_and_tells_all(tmp_path, monkeypatch):
    share = SharedSave(lambda fault: f"not saved: {fault.strerror or fault}", num_processes=2)
    with share.noting_in_libraries():
        torch.save({}, tmp_path / "gone" / "a.pt")
        os.makedirs(tmp_path / "made")
    assert torch.save is torch.serialization.save
    assert list(tmp_path.iterdir()) == []
    with share.noting():
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(shared_save, "gather_object", lambda told: [None, *told])
    with pytest.raises(NotSaved, match=r"^not saved: it could not be written completely; .* -> free some space"):
        share.agree()


def test_a_process_without_a_fault_learns_of_one(monkeypatch):
    share = SharedSave(num_processes=2)
    monkeypatch.setattr(shared_save, "gather_object", lambda told: [*told, "not saved"])
    with pytest.raises(NotSaved, match=r"^not saved -> free some space"):
        share.agree()
    monkeypatch.setattr(shared_save, "gather_object", lambda told: [*told, None])
    share.agree()


def test_a_fault_that_torch_has_told_all_processes():
    from torch.distributed.checkpoint.api import CheckpointException, _wrap_exception

    share = SharedSave(num_processes=2)
    with share.noting():
        raise CheckpointException("write", {1: _wrap_exception(OSError(errno.EFBIG, "File too large"))})
    assert share.fault is not None and share.fault.errno == errno.EFBIG
    with pytest.raises(ZeroDivisionError), share.noting():
        raise CheckpointException("write", {1: _wrap_exception(ZeroDivisionError())})
