"""A process knows where it is and whether the others still run."""

import inspect
import json
import sys
from datetime import timedelta

import pytest
import torch
from torch.distributed import TCPStore

import luthier
from luthier.core.errors import RunFailed
from luthier.training.distributed import peers
from luthier.training.distributed.peers import Pulse, Watch, is_lost_peer, place_of, read_place, watched
from luthier.training.distributed.sums import over_processes
from luthier.workflow import training
from tests.small_world import small_world


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


def test_a_process_that_falls_silent_ends_the_run_for_all(store):
    pulses = [Pulse(store.clone(), rank, 3, silence_seconds=30) for rank in range(3)]
    for now in (0, 10, 20):
        assert [pulse.beat(now) for pulse in pulses] == [None] * 3
    for now in (30, 40, 59):  # the second process has spoken at 20 for the last time, which the first one hears at 30
        assert [pulses[rank].beat(now) for rank in (0, 2)] == [None] * 2
    assert pulses[0].beat(61) == "nothing was heard of rank 1 for 31 s"
    assert pulses[2].beat(62) == "nothing was heard of rank 1 for 31 s"


def test_a_process_that_has_done_its_work_may_be_silent(store):
    first, second = (Pulse(store.clone(), rank, 2, silence_seconds=30) for rank in range(2))
    assert [first.beat(0), second.beat(0)] == [None, None]
    second.leave()
    assert [first.beat(now) for now in (50, 100, 5000)] == [None] * 3


def test_a_process_that_never_came_ends_the_run(store):
    first = Pulse(store, 0, 2, silence_seconds=30)
    assert [first.beat(0), first.beat(29)] == [None, None]
    assert first.beat(31) == "nothing was heard of rank 1 for 31 s"


def test_a_store_that_is_gone_is_silence():
    class Gone:
        def set(self, *args):
            raise torch.distributed.DistNetworkError("Connection reset by peer")

    pulse = Pulse(Gone(), 0, 2, silence_seconds=30)
    assert [pulse.beat(0), pulse.beat(29)] == [None, None]
    assert pulse.beat(31) == "nothing was heard of rank 1 for 31 s"
    pulse.leave()


def test_the_place_is_the_collective_and_our_line():
    caught = []

    def all_reduce() -> None:
        caught.append(place_of(sys._getframe()))

    scope = {"all_reduce": all_reduce}
    library = "def all_gather(): all_reduce()\ndef wrapper(): all_gather()"
    exec(compile(library, "/site-packages/torch/distributed/distributed_c10d.py", "exec"), scope)
    ours = "\n\ndef over_processes(): wrapper()"
    exec(compile(ours, inspect.getsourcefile(over_processes), "exec"), scope)
    scope["over_processes"]()
    assert caught == ["all_gather, called at luthier/training/distributed/sums.py:3 (over_processes)"]


def test_a_place_outside_any_collective():
    assert place_of(sys._getframe()) == "test_a_place_outside_any_collective"


def test_the_place_is_kept_in_the_log_folder(tmp_path):
    watch = Watch(0, 2, tmp_path)
    assert read_place(tmp_path) is None
    watch.start()
    watch.end("all_reduce", lost_peer=True)
    assert {**read_place(tmp_path), "time": 0} == {"place": "all_reduce", "lost_peer": True, "time": 0}
    (tmp_path / peers.PLACE_FILE).write_text("{")
    assert read_place(tmp_path) is None


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1"), True),
        (torch.distributed.DistStoreError("Socket Timeout"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("NCCL"), False),
    ],
)
def test_errors_of_collectives(error, is_lost):
    assert is_lost_peer(error) is is_lost


def test_an_error_of_a_collective_is_told_in_a_sentence(tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "e.json")}.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(RunFailed, match=r"rank 1 lost another process .* waiting for it, in test_an_error_of") as caught,
        watched(),
    ):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1. GLHF\nmore")
    assert "(Connection closed by peer [127.0.0.1]:1) -> see" in str(caught.value)
    assert json.loads((tmp_path / peers.PLACE_FILE).read_text())["lost_peer"] is True


def test_other_errors_and_runs_of_one_process_are_left_alone(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    for words in ("gloo/transport: gone", "another fault"):
        with pytest.raises(RuntimeError, match=words), watched():
            raise RuntimeError(words)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="another fault"), watched():
        raise RuntimeError("another fault")


def test_the_processes_of_a_run_share_a_store(tmp_path):
    assert peers._shared_store() is None
    torch.distributed.init_process_group("gloo", store=TCPStore("127.0.0.1", 0, is_master=True), rank=0, world_size=1)
    try:
        first, second = (Pulse(peers._shared_store(), rank, 2, silence_seconds=30) for rank in range(2))
        assert [first.beat(0), second.beat(0), first.beat(29)] == [None] * 3
        assert first.beat(60) == "nothing was heard of rank 1 for 31 s"
    finally:
        torch.distributed.destroy_process_group()


def test_the_python_api_is_watched_too(tmp_path, monkeypatch):
    keys = small_world(tmp_path)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": str(tmp_path / "e.json")}.items():
        monkeypatch.setenv(name, value)

    def lose(run):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1. GLHF")

    monkeypatch.setattr(training, "train", lose)
    with pytest.raises(RunFailed, match=r"^rank 1 lost another process of this run"):
        luthier.train(keys)
    assert json.loads((tmp_path / peers.PLACE_FILE).read_text())["lost_peer"] is True
