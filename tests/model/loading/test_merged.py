"""Where a model goes that only answers."""

from dataclasses import replace

from luthier.core.machine import detect
from luthier.model.loading.merged import device_map_of


def test_a_single_process_may_use_all_devices_and_each_of_several_has_its_own():
    cpu = replace(detect(), device="cpu", num_accelerators=0)
    alone = replace(cpu, device="cuda", num_accelerators=4)
    assert device_map_of(cpu) is None
    assert device_map_of(alone) == "auto"
    assert device_map_of(replace(alone, world_size=4, local_rank=2)) == {"": "cuda:2"}
