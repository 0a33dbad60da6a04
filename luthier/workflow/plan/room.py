"""The memory that a process of a run has, and what of it is taken before the weights are loaded."""

from collections.abc import Iterable
from dataclasses import dataclass

from luthier.core.allocator import resident_bytes
from luthier.core.machine import Machine, available_memory_bytes


@dataclass(frozen=True, slots=True)
class Room:
    libraries_bytes: int
    """What a training process holds before the weights are loaded."""
    available_bytes: int | None
    """Memory for the whole process, its libraries included; None if the system does not say."""


def room_of(machine: Machine, missing_bytes: int = 0) -> Room:
    """`missing_bytes`: what libraries take that a training process has and this one has not imported."""
    own = resident_bytes()
    return Room(own + missing_bytes, _available_bytes(machine, own))


def _available_bytes(machine: Machine, own_bytes: int) -> int | None:
    if machine.is_assumed:
        return machine.device_memory_bytes
    if machine.device == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    if machine.device != "cpu":
        return None
    free = available_memory_bytes()
    return None if free is None else free // (machine.local_world_size or machine.world_size) + own_bytes


def least(rooms: Iterable[Room]) -> Room:
    """What each process of a run can count on, so that all of them decide alike."""
    known = list(rooms)
    available = [room.available_bytes for room in known if room.available_bytes is not None]
    libraries = max(room.libraries_bytes for room in known)
    return Room(libraries, min(available) if len(available) == len(known) else None)
