"""Memory is shared by the processes of a host, and all processes of a run count on the same."""

from dataclasses import replace

import pytest

from luthier.core.machine import detect
from luthier.workflow.plan import room
from luthier.workflow.plan.room import Room, least, room_of

HERE = replace(detect(), device="cpu", world_size=1, local_world_size=None)


@pytest.mark.parametrize(
    ("processes", "share"),
    [({}, 8000), ({"world_size": 4}, 2000), ({"world_size": 16, "local_world_size": 8}, 1000)],
)
def test_the_processes_of_a_host_share_its_free_memory(monkeypatch, processes, share):
    """Each holds 300 bytes already, which are not free, and would hold 50 more with all libraries."""
    monkeypatch.setattr(room, "available_memory_bytes", lambda: 8000)
    monkeypatch.setattr(room, "resident_bytes", lambda: 300)
    assert room_of(replace(HERE, **processes), missing_bytes=50) == Room(350, share + 300)


def test_what_the_system_does_not_say_and_what_is_assumed(monkeypatch):
    monkeypatch.setattr(room, "available_memory_bytes", lambda: None)
    assert room_of(HERE).available_bytes is None
    assert room_of(replace(HERE, device="mps")).available_bytes is None
    there = replace(HERE, device="cuda", is_assumed=True, device_memory_bytes=80, world_size=8)
    assert room_of(there).available_bytes == 80


def test_every_process_can_count_on_the_least():
    assert least([Room(10, 100), Room(12, 90), Room(11, 95)]) == Room(12, 90)
    assert least([Room(10, 100), Room(12, None)]) == Room(12, None)
