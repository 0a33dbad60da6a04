"""Runs by mcore_adapter: the keys that reach it, the rows it gets, and the folder it leaves (tests/mcore_library.py
stands in for the library). What the library itself computes has not been run."""

import json
import sys
from pathlib import Path

import pytest
import torch

import luthier
from luthier.config.load import load_train, read_source
from luthier.core.errors import ConfigError, MissingExtra, OutputError
from luthier.core.machine import detect
from luthier.workflow.megatron.mcore import INSTALL, arguments, resume_point
from luthier.workflow.plan.shape import unplanned_reason
from luthier.workflow.preflight import load_checked
from tests import mcore_library
from tests.small_world import losses, small_world


@pytest.fixture
def mcore(monkeypatch):
    monkeypatch.setenv("USE_MCA", "1")


@pytest.fixture
def library(mcore, monkeypatch):
    for name, module in mcore_library.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    values = small_world(tmp_path_factory.mktemp("a world"))
    return {**values, "max_steps": 3, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "val_size": 4}


def test_the_losses_and_the_model_are_those_of_an_ordinary_run(library, world, tmp_path, monkeypatch):
    keys = {**world, "eval_strategy": "no", "do_eval": True}
    done = luthier.train({**keys, "save_strategy": "steps", "save_steps": 2, "output_dir": str(tmp_path / "mcore")})
    monkeypatch.delenv("USE_MCA")
    wanted = luthier.train({**keys, "output_dir": str(tmp_path / "usual")})
    assert losses(done) == pytest.approx(losses(wanted), abs=1e-5)
    assert {"train", "eval"} <= done.metrics.keys()
    folder = tmp_path / "mcore"
    found, expected = loaded(folder), loaded(tmp_path / "usual")
    assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-5
    assert not (folder / "megatron.pt").exists() and (folder / "checkpoint-2" / "megatron.pt").exists()
    names = {"run.yaml", "manifest.json", "data_report.json", "train_results.json", "trainer_log.jsonl", "README.md"}
    assert names <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "eval_results.json").read_text())["eval_loss"] > 0


def test_deterministic_kernels_end_with_the_run(library, world, tmp_path):
    luthier.train({**world, "do_eval": False, "max_steps": 1, "full_determinism": True, "output_dir": str(tmp_path)})
    assert not torch.are_deterministic_algorithms_enabled()


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_keys_reach_the_library(library, world):
    keys = {"tensor_model_parallel_size": 2, "recompute_granularity": "full", "ckpt_format": "torch_dist"}
    keys |= {"additional_configs": {"qk_layernorm": True}, "warmup_ratio": 0.1, "moe_token_dispatcher_type": "alltoall"}
    args = arguments(load_train({**world, **keys}), detect(), mcore_library.Seq2SeqTrainingArguments)
    found = {name: getattr(args, name) for name in keys if name != "warmup_ratio"}
    assert found == {name: value for name, value in keys.items() if name != "warmup_ratio"}
    assert (args.pipeline_model_parallel_size, args.context_parallel_size, args.warmup_steps) == (1, 1, 0.1)
    assert args.use_distributed_optimizer is False, "what the user has not written is the default of the library"


def test_a_missing_library_is_said_in_one_sentence(mcore, world, tmp_path):
    with pytest.raises(MissingExtra, match=r"USE_MCA: mcore_adapter cannot be imported here .* -> pip install .*ROLL"):
        luthier.train({**world, "output_dir": str(tmp_path)})


def test_keys_are_checked_without_the_library(mcore, world):
    keys = read_source({**world, "sequence_parallel": True, "moe_token_dispatcher_type": "any"})
    with pytest.raises(ConfigError) as raised:
        load_checked("train", keys, begins=True)
    problems = {problem.key: problem for problem in raised.value.problems}
    assert problems.keys() == {"USE_MCA", "sequence_parallel", "moe_token_dispatcher_type"}
    assert INSTALL in problems["USE_MCA"].remedy
    run = load_checked("train", read_source(world), begins=False)
    assert [warning.key for warning in run.warnings] == ["USE_MCA"], "it may be on the machine that trains"


def test_its_memory_is_not_planned(mcore, world):
    assert unplanned_reason(load_train(world)) == "another library loads and trains the model"


def test_the_checkpoint_to_continue(mcore, world, tmp_path):
    def point(**keys):
        return resume_point(load_train({**world, "overwrite_output_dir": False, "output_dir": str(tmp_path), **keys}))

    assert point() is None
    (tmp_path / "checkpoint-2").mkdir()
    assert point() == str(tmp_path / "checkpoint-2")
    assert point(overwrite_output_dir=True) is None
    assert point(resume_from_checkpoint="another") == "another"
    finished = tmp_path / "finished"
    finished.mkdir()
    (finished / "model.safetensors").touch()
    with pytest.raises(OutputError, match="finished"):
        point(output_dir=str(finished))
