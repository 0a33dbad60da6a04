"""With several processes too, free memory decides about recomputation and refuses what cannot fit, in all alike."""

from dataclasses import replace

import pytest

from luthier.config.load import load_train
from luthier.core.errors import InvalidInput
from luthier.core.kinds import STAGES
from luthier.core.machine import detect
from luthier.data.prepare import prepare
from luthier.workflow.plan import room
from luthier.workflow.plan.foresight import foresee
from luthier.workflow.plan.recompute import as_asked
from luthier.workflow.plan.room import Room
from luthier.workflow.text import load_text_side
from tests.matrix import representatives
from tests.small_world import WAYS, small_world

NUM_PROCESSES, NUM_LAYERS = 4, 6
MUCH = 10**15
ENGINES = {
    "ddp": {},
    "fsdp2": {"fsdp": "full_shard auto_wrap"},
    "zero2": {"deepspeed": {"zero_optimization": {"stage": 2}}},
    "zero3": {"deepspeed": {"zero_optimization": {"stage": 3}}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    values = small_world(tmp_path_factory.mktemp("world"), num_hidden_layers=NUM_LAYERS)
    return {**values, **WAYS["lora"], "per_device_train_batch_size": 2}


@pytest.fixture
def foreseen(world, monkeypatch):
    """What one of four processes foresees that has `free` bytes for itself, and others that have rooms of their own."""

    def of(engine, free, others=()):
        monkeypatch.setattr(room, "available_memory_bytes", lambda: NUM_PROCESSES * free)
        monkeypatch.setattr(room, "resident_bytes", lambda: 0)
        monkeypatch.setattr("accelerate.utils.gather_object", lambda rooms: [*rooms, *others])
        run = load_train({**world, **ENGINES[engine]})
        stage = STAGES.get(run.stage)
        text = load_text_side(run)
        machine = replace(detect(), device="cpu", world_size=NUM_PROCESSES, local_world_size=None)
        return foresee(run, stage, text, prepare(run, stage.rows, text.encoding), machine)

    return of


@pytest.mark.parametrize("engine", representatives(ENGINES, "fsdp2"))
def test_free_memory_decides_and_the_process_with_the_least_of_it(foreseen, engine):
    kept = foreseen(engine, MUCH)
    assert kept.plan.engine.name == engine and kept.recompute.num_layers == 0
    most, least = (kept.plan.held.peak_bytes(kept.plan.traces.at(count)) for count in (0, NUM_LAYERS))
    share = 0.75 if engine == "ddp" else 0.5  # the peak of sharded runs was never compared with a run
    between = round((most + least) / 2 / share)
    some = foreseen(engine, between).recompute
    assert 0 < some.num_layers < NUM_LAYERS and "layers are computed again" in some.reason
    assert foreseen(engine, MUCH, [Room(0, between), Room(0, 2 * between)]).recompute == some
    assert foreseen(engine, round(0.9 * least / share)).recompute.num_layers is None


@pytest.mark.parametrize("engine", ENGINES)
def test_what_fits_into_no_process_is_refused_by_all(foreseen, engine):
    remedy = "start more processes" if engine in ("fsdp2", "zero3") else "fsdp: true"
    with pytest.raises(InvalidInput, match=rf"of memory in each process, of which .*{remedy}.*skip_memory_check: true"):
        foreseen(engine, MUCH, [Room(0, 1000)])


def test_fsdp_that_recomputes_by_itself_is_asked_for(world):
    keys = {**world, **ENGINES["fsdp2"]}
    assert as_asked(load_train(keys)) is None
    found = as_asked(load_train({**keys, "fsdp_config": {"activation_checkpointing": True}}))
    assert found.num_layers is None and "activation_checkpointing of fsdp_config is given" in found.reason
