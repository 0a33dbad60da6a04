"""Two processes that share each layer (`tp_size`) train as one process does, and save weights that plain transformers
or peft loads. Resumed, they go on as if nothing had been."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import luthier
from luthier.core.errors import InvalidInput, OutputError
from tests.matrix import representatives
from tests.runs.test_engines import loaded, logged, start_several, start_two
from tests.small_world import losses, small_world
from tests.tiny import tiny_llama

SAVED_STEP = 2
LORA = {"finetuning_type": "lora", "lora_target": "all"}
BEST = {
    "eval_strategy": "steps",
    "eval_steps": 1,
    "save_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": True,
}
CASES: dict[str, dict[str, Any]] = {
    "sft full": {"finetuning_type": "full", "neftune_noise_alpha": 5, "compute_accuracy": True},
    "sft lora": LORA,
    "sft packed": {**LORA, "neat_packing": True, "gradient_checkpointing": False},
    "sft weighted": {"finetuning_type": "full", "dataset": "weighted", "use_dft_loss": True},
    "pt full": {"stage": "pt", "dataset": "plain", "finetuning_type": "full", "cutoff_len": 64},
    "pt lora": {**LORA, "stage": "pt", "dataset": "plain", "cutoff_len": 64, "use_rslora": True},
    "tied": {"finetuning_type": "full", "max_grad_norm": 0.1},
    # The first checkpoint counts as the best.
    "best full": {**BEST, "finetuning_type": "full"},
    "best lora": {**BEST, **LORA},
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
        resumed = {"resume_from_checkpoint": str(folder / case / f"checkpoint-{SAVED_STEP}")}
        for name, more in ((case, {}), (f"{case} resumed", resumed)):
            files.append(folder / f"{name}.yaml")
            keys = {**keys_of(case, world), "tp_size": 2, "output_dir": str(folder / name), **more}
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


@pytest.mark.parametrize("case", representatives(CASES, "sft full"))
def test_a_resumed_run_ends_in_the_bits_of_an_uninterrupted_one(case, of_two):
    whole, resumed = of_two / case, of_two / f"{case} resumed"
    assert logged(resumed) == logged(whole)
    expected, found = loaded(whole), loaded(resumed)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["sft lora"])
def test_one_process_does_not_resume_what_two_have_split(case, world, of_two, tmp_path):
    saved = of_two / case / f"checkpoint-{SAVED_STEP}"
    keys = {**keys_of(case, world), "output_dir": str(tmp_path), "resume_from_checkpoint": str(saved)}
    with pytest.raises(OutputError, match="it was saved with tp_size, and this run does not split layers"):
        luthier.train(keys)


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["full", "lora"])
def test_four_processes_go_on_where_two_have_stopped(way, world, tmp_path):
    model = str(tiny_llama(tmp_path / "model", num_key_value_heads=4))
    keys = {**world, **(LORA if way == "lora" else {"finetuning_type": "full"}), "model_name_or_path": model}
    for num_processes, name in ((2, "two"), (4, "four")):
        values = {**keys, "tp_size": num_processes, "output_dir": str(tmp_path / name)}
        if name == "four":
            values["resume_from_checkpoint"] = str(tmp_path / "two" / f"checkpoint-{SAVED_STEP}")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        start_several([tmp_path / f"{name}.yaml"], num_processes)
    assert logged(tmp_path / "four") == pytest.approx(logged(tmp_path / "two"), abs=1e-5)
    found, expected = loaded(tmp_path / "four"), loaded(tmp_path / "two")
    assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-4


def test_one_process_does_not_share_layers(world, tmp_path):
    with pytest.raises(InvalidInput, match=r"tp_size: 2 processes share each layer, and there is one process"):
        luthier.train({**world, "tp_size": 2, "finetuning_type": "full", "output_dir": str(tmp_path)})
