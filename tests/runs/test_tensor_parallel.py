"""Two processes that share each layer (`tp_size`) train as one process does, and save weights that plain transformers
or peft loads."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import luthier
from luthier.core.errors import InvalidInput
from tests.runs.test_engines import loaded, logged, start_two
from tests.small_world import losses, small_world
from tests.tiny import tiny_llama

SAVED_STEP = 2
LORA = {"finetuning_type": "lora", "lora_target": "all"}
CASES: dict[str, dict[str, Any]] = {
    "sft full": {"finetuning_type": "full", "neftune_noise_alpha": 5, "compute_accuracy": True},
    "sft lora": LORA,
    "sft packed": {**LORA, "neat_packing": True, "gradient_checkpointing": False},
    "sft weighted": {"finetuning_type": "full", "dataset": "weighted", "use_dft_loss": True},
    "pt full": {"stage": "pt", "dataset": "plain", "finetuning_type": "full", "cutoff_len": 64},
    "pt lora": {**LORA, "stage": "pt", "dataset": "plain", "cutoff_len": 64, "use_rslora": True},
    "tied": {"finetuning_type": "full", "max_grad_norm": 0.1},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("a world") / "with spaces")
    return {
        **values,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "disable_shuffling": False,
        "val_size": 3,
        "do_eval": True,
        "eval_strategy": "no",
        "save_strategy": "steps",
        "save_steps": SAVED_STEP,
        "save_only_model": True,
        "overwrite_output_dir": False,
        "ddp_timeout": 120,
    }


def keys_of(case: str, world: dict[str, Any]) -> dict[str, Any]:
    if case != "tied":
        return {**world, **CASES[case]}
    folder = Path(world["dataset_dir"]).with_name("tied model")
    return {**world, **CASES[case], "model_name_or_path": str(tiny_llama(folder, tie_word_embeddings=True))}


@pytest.fixture(scope="module")
def of_two(request, world, tmp_path_factory) -> Path:
    """What two processes have left of each case: one start for all of them."""
    folder, files = tmp_path_factory.mktemp("two"), []
    tests = [item for item in request.session.items if item.nodeid.startswith("tests/runs/test_tensor_parallel")]
    for case in dict.fromkeys(item.callspec.params["case"] for item in tests if "of_two" in item.fixturenames):
        files.append(folder / f"{case}.yaml")
        keys = {**keys_of(case, world), "tp_size": 2, "output_dir": str(folder / case)}
        files[-1].write_text(yaml.safe_dump(keys))
    start_two(files, folder / "log")
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_two_processes_that_share_layers_are_one(case, world, of_two, tmp_path):
    alone = luthier.train({**keys_of(case, world), "output_dir": str(tmp_path / "alone")})
    folder = of_two / case
    assert logged(folder) == pytest.approx(losses(alone), abs=1e-5)
    evaluation = json.loads((folder / "eval_results.json").read_text())
    wanted = alone.metrics["eval"]
    for name in ("eval_loss", *(["eval_accuracy"] if "compute_accuracy" in CASES[case] else [])):
        assert evaluation[name] == pytest.approx(wanted[name], abs=1e-5)
    for saved in (".", f"checkpoint-{SAVED_STEP}"):
        found, expected = loaded(folder / saved), loaded(tmp_path / "alone" / saved)
        assert found.keys() == expected.keys()
        assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-4


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["sft lora"])
def test_split_layers_are_not_filled_from_a_checkpoint(case, world, of_two):
    """The rules see the key, and the run what lies in its folder."""
    keys = {**keys_of(case, world), "tp_size": 2, "output_dir": str(of_two / case)}
    with pytest.raises(InvalidInput, match=r"tp_size: training cannot be resumed from .*checkpoint-3"):
        luthier.train(keys)


def test_one_process_does_not_share_layers(world, tmp_path):
    with pytest.raises(InvalidInput, match=r"tp_size: 2 processes share each layer, and there is one process"):
        luthier.train({**world, "tp_size": 2, "finetuning_type": "full", "output_dir": str(tmp_path)})
