"""Two processes that share the tokens of each batch (`sp_size`) train as one process does, on rows of 4,096 tokens."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import luthier
from luthier.core.errors import InvalidInput
from luthier.workflow.predict import PREDICTIONS_FILE
from tests.runs.test_engines import CONFIGS, HAS_DEEPSPEED, loaded, logged, start_several, start_two
from tests.small_world import losses, small_world
from tests.tiny import tiny_llama

NUM_TOKENS, NUM_STEPS, SAVED_STEP = 4096, 2, 1
FSDP = {"fsdp": True, "fsdp_config": {"fsdp_state_dict_type": "FULL_STATE_DICT"}}
PREDICTED = {"do_predict": True, "predict_with_generate": True, "max_new_tokens": 4}
CASES: dict[str, dict[str, Any]] = {
    "sft full": {"finetuning_type": "full"},
    "sft lora": {"finetuning_type": "lora", "lora_target": "all"},
    "sft packed": {"finetuning_type": "full", "packing": True},
    "sft neatly packed": {"finetuning_type": "lora", "lora_target": "all", "neat_packing": True},
    "sft long prompts": {
        "finetuning_type": "full",
        "dataset": "prompts",
        "per_device_train_batch_size": 1,
        **PREDICTED,
    },
    "sft weighted": {"finetuning_type": "full", "dataset": "weighted", "use_dft_loss": True},
    "pt full": {"stage": "pt", "dataset": "texts", "finetuning_type": "full"},
    "pt lora": {"stage": "pt", "dataset": "texts", "finetuning_type": "lora", "lora_target": "all"},
    "pt unpacked": {"stage": "pt", "dataset": "texts", "finetuning_type": "full", "packing": False},
    "recomputed": {"finetuning_type": "full", "disable_gradient_checkpointing": False},
    "fsdp": {"finetuning_type": "full", **FSDP},
    "zero2": {"finetuning_type": "lora", "lora_target": "all", "deepspeed": str(CONFIGS / "ds_z2_config.json")},
    "zero3": {"finetuning_type": "full", "deepspeed": str(CONFIGS / "ds_z3_config.json")},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("a world") / "with spaces")
    data = Path(values["dataset_dir"])
    rows = [
        {"instruction": f"Count to {number}.", "output": " ".join(map(str, range(number)))[: 700 + 400 * (number % 9)]}
        for number in range(1000, 1030)
    ]
    (data / "long.json").write_text(json.dumps(rows), encoding="utf-8")
    prompts = [{"instruction": "very " * (650 + 5 * n) + "long", "output": f"short {n}"} for n in range(20)]
    (data / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    texts = [{"text": f"This is line {n} of a plain text.\n" * (60 + 3 * n)} for n in range(40)]
    (data / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    more = {name: {"file_name": f"{name}.json"} for name in ("long", "prompts")}
    more["texts"] = {"file_name": "texts.json", "columns": {"prompt": "text"}}
    info = json.loads((data / "dataset_info.json").read_text())
    (data / "dataset_info.json").write_text(json.dumps({**info, **more}))
    return {
        **values,
        "model_name_or_path": str(tiny_llama(data.parent / "long model", max_position_embeddings=NUM_TOKENS)),
        "dataset": "long",
        "cutoff_len": NUM_TOKENS,
        "max_steps": NUM_STEPS,
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
        "disable_gradient_checkpointing": True,
        "ddp_timeout": 120,
    }


@pytest.fixture(scope="module")
def of_two(request, world, tmp_path_factory) -> Path:
    """What two processes have left of each case: one start for all of them."""
    folder, files = tmp_path_factory.mktemp("two"), []
    tests = [item for item in request.session.items if item.nodeid.startswith("tests/runs/test_long_context")]
    chosen = dict.fromkeys(item.callspec.params["case"] for item in tests if "of_two" in item.fixturenames)
    for case in (case for case in chosen if HAS_DEEPSPEED or "deepspeed" not in CASES[case]):
        resumed = {"resume_from_checkpoint": str(folder / case / f"checkpoint-{SAVED_STEP}")}
        for name, more in ((case, {}), (f"{case} resumed", resumed)):
            files.append(folder / f"{name}.yaml")
            keys = {**world, **CASES[case], **more, "sp_size": 2, "output_dir": str(folder / name)}
            files[-1].write_text(yaml.safe_dump(keys))
    start_two(files, folder / "log")
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES)
def test_two_processes_that_share_tokens_are_one(case, world, of_two, tmp_path):
    if "deepspeed" in CASES[case]:
        pytest.importorskip("deepspeed")
    keys = {key: value for key, value in CASES[case].items() if key != "deepspeed" and not key.startswith("fsdp")}
    alone = luthier.train({**world, **keys, "output_dir": str(tmp_path / "alone")})
    folder = of_two / case
    assert logged(folder) == pytest.approx(losses(alone), abs=1e-5)
    assert logged(of_two / f"{case} resumed") == logged(folder)
    evaluation = json.loads((folder / "eval_results.json").read_text())
    assert evaluation["eval_loss"] == pytest.approx(alone.metrics["eval"]["eval_loss"], abs=1e-5)
    found, expected = loaded(folder), loaded(tmp_path / "alone")
    assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-4
    if "do_predict" in keys:
        texts = [(out / PREDICTIONS_FILE).read_text() for out in (folder, tmp_path / "alone")]
        assert texts[0] == texts[1] and texts[0].count("\n") == world["val_size"]


def test_one_process_cannot_share_tokens(world, tmp_path):
    with pytest.raises(InvalidInput, match=r"sp_size: 2 processes share the tokens .* there is one process"):
        luthier.train({**world, "sp_size": 2, "output_dir": str(tmp_path)})


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["sft full"])
def test_one_process_goes_on_where_two_have_stopped(case, world, of_two, tmp_path):
    """Every step has the same rows, however many processes share their tokens."""
    saved = of_two / case / f"checkpoint-{SAVED_STEP}"
    keys = {**world, **CASES[case], "resume_from_checkpoint": str(saved), "output_dir": str(tmp_path)}
    assert losses(luthier.train(keys)) == pytest.approx(logged(of_two / case), abs=1e-5)


@pytest.mark.thorough
def test_two_groups_of_two_are_two_processes(world, tmp_path):
    """Four processes with `sp_size: 2` against one process that has the rows of both groups."""
    keys = {**world, "finetuning_type": "lora", "lora_target": "all", "save_strategy": "no"}
    alone = luthier.train({**keys, "per_device_train_batch_size": 4, "output_dir": str(tmp_path / "alone")})
    run_file = tmp_path / "four.yaml"
    run_file.write_text(yaml.safe_dump({**keys, "sp_size": 2, "output_dir": str(tmp_path / "four")}))
    start_several([run_file], 4)
    assert logged(tmp_path / "four") == pytest.approx(losses(alone), abs=1e-5)
    found, expected = loaded(tmp_path / "four"), loaded(tmp_path / "alone")
    assert max((found[name] - expected[name]).abs().max() for name in expected) < 1e-4
