"""Two processes that share a run through DDP, FSDP 2 or DeepSpeed are one run: the losses and weights of one process.

For each engine and stage: the losses of every step, the same losses after a stop and a resume, and a final folder
that plain transformers or peft loads, with the weights that one process trains. All runs share two processes.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock

import luthier
from luthier.core.errors import OutputError
from luthier.training.distributed.engines import DDP, DEEPSPEED, FSDP, saved_by
from tests import killable
from tests.matrix import representatives
from tests.small_world import losses, small_world

NUM_STEPS, SAVED_STEP = 4, 2
PATIENCE_SECONDS = 1800
"""For all runs of one start; with DeepSpeed a minute of it compiles its operators."""
ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "deepspeed"
STAGES = {
    "pt": {"stage": "pt", "dataset": "plain", "cutoff_len": 32},
    "sft": {"stage": "sft", "dataset": "numbers"},
    "rm": {"stage": "rm", "dataset": "pairs"},
    "dpo": {"stage": "dpo", "dataset": "pairs"},
    "kto": {"stage": "kto", "dataset": "feedback"},
}
WAYS = {
    "full": {"finetuning_type": "full"},
    "lora": {"finetuning_type": "lora", "lora_target": "all"},
    "qlora": {"finetuning_type": "lora", "lora_target": "all", "quantization_bit": 4},
    "sgd": {"finetuning_type": "full", "optim": "sgd", "learning_rate": 0.1},
}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "fsdp2": {"fsdp": "full_shard auto_wrap", "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
    "fsdp2_offload": {"fsdp": ["full_shard", "offload"], "fsdp_config": {"fsdp_reshard_after_forward": True}},
    "fsdp2_sharded_files": {"fsdp": True, "fsdp_config": {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}},
    **{f"zero{n}": {"deepspeed": str(CONFIGS / f"ds_z{n}_config.json")} for n in (0, 1, 2, 3)},
    "zero2_offload": {"deepspeed": str(CONFIGS / "ds_z2_offload_config.json")},
    "zero3_offload": {"deepspeed": str(CONFIGS / "ds_z3_offload_config.json")},
}
MATRIX = {
    "ddp": "pt-lora sft-full rm-full dpo-lora kto-lora",
    "fsdp2": "pt-full pt-lora sft-full sft-lora sft-qlora sft-sgd rm-full rm-lora dpo-full dpo-lora kto-full kto-lora",
    "fsdp2_offload": "sft-full",
    "fsdp2_sharded_files": "sft-lora sft-sgd",
    "zero0": "sft-lora",
    "zero1": "rm-full",
    "zero2": "pt-full sft-qlora kto-lora",
    "zero3": "pt-full sft-full sft-lora rm-lora dpo-full kto-lora",
    "zero2_offload": "sft-full",
    "zero3_offload": "sft-full",
}
"""Engine -> stages and ways to train."""
CASES: dict[str, tuple[str, str, str]] = {
    f"{engine}-{case}": (engine, *case.split("-")) for engine, cases in MATRIX.items() for case in cases.split()
}
PLAIN = ("fsdp2-sft-full", "fsdp2-dpo-lora")
"""Those of `make test`."""
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("a world") / "with spaces")
    return {
        **values,
        "max_steps": NUM_STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine",
        "disable_shuffling": False,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": SAVED_STEP,
        "overwrite_output_dir": False,
        "ddp_timeout": 120,
    }


@pytest.fixture(scope="module")
def of_one(world, tmp_path_factory):
    """(stage, way) -> losses and folder of a run of one process; each is made once."""
    folder, made = tmp_path_factory.mktemp("one"), {}

    def get(stage: str, way: str) -> tuple[list[float], Path]:
        if (stage, way) not in made:
            out = folder / f"{stage} {way}"
            keys = {**world, **STAGES[stage], **WAYS[way], "save_strategy": "no", "output_dir": str(out)}
            made[stage, way] = losses(luthier.train(keys)), out
        return made[stage, way]

    return get


@pytest.fixture(scope="module")
def of_two(request, world, tmp_path_factory) -> Path:
    """The folder with what two processes have left of each case that is asked for, and of it resumed half-way.

    The workers of pytest-xdist share it.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "two"
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "done").exists():
            cases = asked_for(request.session.items)
            start_two([file for case in cases for file in run_files(case, world, folder)], folder / "log")
            (folder / "done").touch()
    return folder


def run_files(case: str, world: dict[str, Any], folder: Path) -> list[Path]:
    """Of the undisturbed run, and of the one that goes on from its checkpoint."""
    engine, stage, way = CASES[case]
    keys = {**world, **STAGES[stage], **WAYS[way], **ENGINES[engine], "per_device_train_batch_size": 2}
    resumed = {"resume_from_checkpoint": str(folder / case / f"checkpoint-{SAVED_STEP}")}
    found = []
    for name, more in ((case, {}), (f"{case} resumed", resumed)):
        found.append(folder / f"{name}.yaml")
        found[-1].write_text(yaml.safe_dump({**keys, **more, "output_dir": str(folder / name)}))
    return found


def asked_for(items: list[pytest.Item]) -> list[str]:
    """The cases of the tests that this session runs."""
    own = [item for item in items if item.path == Path(__file__) and hasattr(item, "callspec")]
    found = {item.callspec.params["case"] for item in own if "case" in item.callspec.params}
    return [case for case in CASES if case in found and (HAS_DEEPSPEED or not case.startswith("zero"))]


def start_two(files: list[Path], log: Path) -> None:
    process = killable.start_each(files, log, 2)
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 0, log.read_text()


def start_several(files: list[Path], num_processes: int) -> None:
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_processes)]
    start([*words, "-m", "tests.runs.each_of", *map(str, files)])


def start(words: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", representatives(CASES, *PLAIN))
def test_two_processes_are_one_run(case, of_one, of_two):
    engine, stage, way = CASES[case]
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    wanted, alone = of_one(stage, way)
    folder = of_two / case
    assert saved_by(folder / f"checkpoint-{SAVED_STEP}")[0] == engine_named(engine)
    assert logged(folder) == pytest.approx(wanted, abs=1e-5)
    assert logged(folder.with_name(f"{folder.name} resumed")) == logged(folder)
    for out in (folder, folder.with_name(f"{folder.name} resumed")):
        found, expected = loaded(out), loaded(alone)
        assert found.keys() == expected.keys()
        assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-4


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["ddp-sft-full"])
def test_one_process_goes_on_where_two_have_stopped(case, world, of_one, of_two, tmp_path):
    """With the batch of both, so that every step has the same rows."""
    folder = of_two / case / f"checkpoint-{SAVED_STEP}"
    keys = {**world, **STAGES["sft"], **WAYS["full"], "output_dir": str(tmp_path / "out")}
    again = luthier.train({**keys, "resume_from_checkpoint": str(folder)})
    assert losses(again) == pytest.approx(of_one("sft", "full")[0], abs=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["fsdp2-sft-full", "fsdp2_sharded_files-sft-lora"])
def test_four_processes_go_on_where_two_have_stopped(case, world, of_one, of_two, tmp_path):
    """With the batch of two, so that every step has the same rows."""
    engine, stage, way = CASES[case]
    keys = {**world, **STAGES[stage], **WAYS[way], **ENGINES[engine], "per_device_train_batch_size": 1}
    keys["resume_from_checkpoint"] = str(of_two / case / f"checkpoint-{SAVED_STEP}")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**keys, "output_dir": str(tmp_path / "run")}))
    start_several([tmp_path / "run.yaml"], 4)
    wanted, alone = of_one(stage, way)
    assert logged(tmp_path / "run") == pytest.approx(wanted, abs=1e-5)
    found, expected = loaded(tmp_path / "run"), loaded(alone)
    assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-4


@pytest.mark.parametrize("case", ["fsdp2-sft-full"])
def test_another_engine_is_refused_in_one_sentence(case, world, of_two, tmp_path):
    keys = {**world, **STAGES["sft"], **WAYS["full"], "output_dir": str(tmp_path / "out")}
    saved = of_two / case / f"checkpoint-{SAVED_STEP}"
    with pytest.raises(
        OutputError, match="was saved with FSDP, and this run trains with whole weights in each process"
    ):
        luthier.train({**keys, "resume_from_checkpoint": str(saved)})


@pytest.mark.thorough
def test_the_launcher_of_accelerate_chooses_the_engine(world, of_one, tmp_path):
    keys = {**world, **STAGES["sft"], **WAYS["lora"], "per_device_train_batch_size": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**keys, "output_dir": str(tmp_path / "run")}))
    words = [sys.executable, "-m", "accelerate.commands.launch"]
    words += ["--config_file", str(ROOT / "examples/accelerate/fsdp2_config.yaml"), "-m", "tests.runs.each_of"]
    start([*words, str(tmp_path / "run.yaml")])
    assert logged(tmp_path / "run") == pytest.approx(of_one("sft", "lora")[0], abs=1e-5)
    assert saved_by(tmp_path / "run" / f"checkpoint-{SAVED_STEP}")[0] == FSDP


def engine_named(name: str) -> str:
    return FSDP if name.startswith("fsdp") else DEEPSPEED if name.startswith("zero") else DDP


def logged(folder: Path) -> list[float]:
    """The losses of the steps, or why there are none."""
    for error in sorted(folder.parent.glob(f"{folder.name}.error*")):
        pytest.fail(error.read_text())
    state = json.loads((folder / "trainer_state.json").read_text())
    return [logs["loss"] for logs in state["log_history"] if "loss" in logs]


def loaded(folder: Path) -> Mapping[str, torch.Tensor]:
    """The weights as plain transformers or peft loads them; all of those that the model has are in the files."""
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    scores = (folder / "value_head.safetensors").is_file()
    if (folder / "adapter_config.json").is_file():
        adapter = AutoPeftModelForSequenceClassification if scores else AutoPeftModelForCausalLM
        model = adapter.from_pretrained(folder, **({"num_labels": 1} if scores else {}))
    else:
        kind = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
        model, told = kind.from_pretrained(folder, output_loading_info=True)
        assert not any(told.values()), told
    # The layer that peft has replaced by its trained copy is random: the base model has none.
    named = {name: weight for name, weight in model.state_dict().items() if ".original_module." not in name}
    return {name: weight.float() for name, weight in named.items()}
