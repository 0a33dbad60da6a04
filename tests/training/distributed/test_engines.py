"""Which engine has saved a checkpoint, and who may resume it."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType

from luthier.core.errors import MissingExtra, OutputError
from luthier.training.distributed.engines import (
    DDP,
    DEEPSPEED,
    FSDP,
    building_operators,
    loading_whole,
    require_one_start,
    require_same_engine,
    saved_by,
)


def accelerator(kind: DistributedType, num_processes: int) -> SimpleNamespace:
    return SimpleNamespace(distributed_type=kind, num_processes=num_processes)


@pytest.fixture
def checkpoints(tmp_path):
    """Engine -> a checkpoint of two processes, by the names of its files."""
    files = {
        DDP: ["model.safetensors", "optimizer.pt", "rng_state_0.pth", "rng_state_1.pth"],
        FSDP: ["pytorch_model_fsdp.bin", "optimizer.bin"],
        DEEPSPEED: [f"global_step2/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)],
    }
    for number, names in enumerate(files.values()):
        for name in names:
            path = tmp_path / str(number) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return {engine: tmp_path / str(number) for number, engine in enumerate(files)}


def test_the_files_tell_the_engine(checkpoints):
    assert {engine: saved_by(folder) for engine, folder in checkpoints.items()} == {
        DDP: (DDP, None),
        FSDP: (FSDP, None),
        DEEPSPEED: (DEEPSPEED, 2),
    }


@pytest.mark.parametrize(
    ("saved", "kind", "num_processes"),
    [
        (DDP, DistributedType.NO, 1),
        (DDP, DistributedType.MULTI_GPU, 8),
        (FSDP, DistributedType.FSDP, 3),
        (DEEPSPEED, DistributedType.DEEPSPEED, 2),
    ],
)
def test_an_engine_resumes_what_it_has_saved(checkpoints, saved, kind, num_processes):
    require_same_engine(checkpoints[saved], accelerator(kind, num_processes))


@pytest.mark.parametrize(
    ("saved", "kind", "words"),
    [
        (DDP, DistributedType.FSDP, "saved with whole weights in each process, and this run trains with FSDP"),
        (FSDP, DistributedType.MULTI_CPU, "saved with FSDP, and this run trains with whole weights"),
        (DEEPSPEED, DistributedType.FSDP, "saved with DeepSpeed, and this run trains with FSDP"),
        (DEEPSPEED, DistributedType.DEEPSPEED, "DeepSpeed has saved it from 2 processes and cannot share its state"),
    ],
)
def test_others_are_refused(checkpoints, saved, kind, words):
    with pytest.raises(OutputError, match=words) as refused:
        require_same_engine(checkpoints[saved], accelerator(kind, 3))
    assert " -> resume with " in str(refused.value)


def test_a_model_is_whole_while_it_is_loaded():
    """transformers would shard it for ZeRO-3 as it is built."""
    from transformers.integrations import deepspeed

    class Settings:
        def is_zero3(self) -> bool:
            return True

    settings = Settings()
    deepspeed.set_hf_deepspeed_config(settings)
    try:
        assert deepspeed.is_deepspeed_zero3_enabled()
        with loading_whole():
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_an_operator_that_cannot_be_compiled_is_told_in_one_sentence():
    with pytest.raises(MissingExtra, match=r"cannot be compiled here .* -> install ninja"), building_operators():
        raise RuntimeError("DeepSpeedCPUAdam requires the cpu_adam op, which failed to build/load.")
    with pytest.raises(RuntimeError, match="another fault"), building_operators():
        raise RuntimeError("another fault")


def test_processes_that_found_different_checkpoints_do_not_start(tmp_path):
    mine = tmp_path / "checkpoint-4"
    require_one_start(mine, [str(mine)] * 2)
    require_one_start(None, ["None"])
    with pytest.raises(OutputError, match=r"found different checkpoints \(.*checkpoint-4, None\)"):
        require_one_start(mine, [str(mine), "None"])
