"""A resumed run ends with the weights and losses of an uninterrupted one, bit for bit."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.core.errors import OutputError, RunFailed
from luthier.core.kinds import STAGES
from luthier.core.manifest import read_manifest, verify_folder, write_manifest
from tests.matrix import representatives
from tests.small_world import WAYS, losses, small_world
from tests.tiny import tiny_llama

DROPOUT = {"lora": {"lora_dropout": 0.2}, "qlora": {"lora_dropout": 0.2}, "oft": {"module_dropout": 0.2}}
STAGE_KEYS: dict[str, dict[str, Any]] = {
    "pt": {"dataset": "plain", "cutoff_len": 48},
    "sft": {},
    "rm": {"dataset": "pairs"},
    "dpo": {"dataset": "pairs", "pref_bco_weight": 0.5, "learning_rate": 1e-3},
    "kto": {"dataset": "feedback", "learning_rate": 1e-3},
    "gkd": {},
}
"""Those of ppo and grpo are in `test_rollouts.py`."""
NOISY = {"neftune_noise_alpha": 5.0, "per_device_train_batch_size": 2}
"""In the middle of an epoch."""
KINDS: dict[str, dict[str, Any]] = {
    **{
        f"{stage} {way}": {
            "stage": stage,
            **keys,
            **WAYS[way],
            **(DROPOUT.get(way, {}) if STAGES.get(stage).has_dropout else {}),
        }
        for stage, keys in STAGE_KEYS.items()
        for way in WAYS
    },
    "sft pissa": {"pissa_init": True, "pissa_iter": 4, "lora_rank": 4, "finetuning_type": "lora"},
    "sft dora": {"use_dora": True, "use_rslora": True, "finetuning_type": "lora"},
    "sft llama pro": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "use_llama_pro": True},
    "sft lora on hqq": {**WAYS["lora"], "quantization_bit": 4, "quantization_method": "hqq"},
    "sft new rows": {"template": "llama3", "finetuning_type": "lora"},
    "sft new rows in full": {"add_special_tokens": "<a>", "finetuning_type": "oft", "oft_block_size": 16},
    "sft lora in 16 bits": {"pure_bf16": True, "finetuning_type": "lora", "additional_target": "norm"},
    "sft oft in 16 bits": {"pure_bf16": True, "finetuning_type": "oft", "oft_block_size": 16},
    "kto neftune": {**STAGE_KEYS["kto"], **NOISY, "stage": "kto", "finetuning_type": "lora"},
    "dpo neftune": {**STAGE_KEYS["dpo"], **NOISY, "stage": "dpo", "finetuning_type": "lora"},
    "sft asft": {"use_asft_loss": True, "finetuning_type": "full"},
    "gkd own answers": {"stage": "gkd", "finetuning_type": "lora", "gkd_lambda": 0.5, "max_new_tokens": 6},
}
STEPS = 8
"""Of 4 rows each: with 24 rows an epoch has six steps, so step 8 is in the second epoch."""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("world"), attention_dropout=0.1)
    teacher = tiny_llama(tmp_path_factory.mktemp("teacher"), seed=7, max_position_embeddings=1024)
    return {
        **values,
        "teacher_model": str(teacher),
        "disable_shuffling": False,
        "overwrite_output_dir": False,
        "lr_scheduler_type": "cosine",
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 4,
    }


@pytest.fixture(scope="module")
def whole_run(world, tmp_path_factory):
    """Uninterrupted runs of `STEPS` steps, each made once: kind -> (folder, losses)."""
    made: dict[str, tuple[Path, list[float]]] = {}

    def make(kind: str) -> tuple[Path, list[float]]:
        if kind not in made:
            folder = tmp_path_factory.mktemp("whole") / "out"
            result = luthier.train({**world, **KINDS[kind], "output_dir": str(folder)})
            made[kind] = folder, losses(result)
        return made[kind]

    return make


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = [*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")]
    return load_file(path)


def assert_same_end(folder: Path, result: Any, whole: Path, whole_losses: list[float]) -> None:
    expected, found = weights(whole), weights(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert losses(result) == whole_losses


def stopped_at(step: int, whole: Path, folder: Path) -> Path:
    """The output folder of a run that was stopped right after a checkpoint."""
    folder.mkdir()
    shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    shutil.copy(whole / "trainer_log.jsonl", folder)
    return folder


def test_settings_that_a_checkpoint_replaces_are_told(world, whole_run, tmp_path, capsys):
    """The optimizer takes them from the checkpoint, so the run ends as if the keys had not changed."""
    keys, (whole, whole_losses) = KINDS["sft full"], whole_run("sft full")
    folder = stopped_at(4, whole, tmp_path / "out")
    changed = {"learning_rate": 1e-4, "weight_decay": 0.1}
    result = luthier.train({**world, **keys, **changed, "output_dir": str(folder)})
    assert_same_end(folder, result, whole, whole_losses)
    told = capsys.readouterr().err
    assert "learning_rate: 0.0001: is not followed" in told and "with 0.01" in told
    assert "weight_decay: 0.1: is not followed" in told and "adam_" not in told


TIMES = ("runtime", "per_second", "throughput", "total_flos", "time")
"""In the names of numbers that the clock decides; transformers counts the work of one process alone."""


def lines(rows: Any) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not any(time in name for time in TIMES)} for row in rows]


@pytest.mark.parametrize("kind", ["sft lora", "dpo full", "kto lora", "gkd own answers"])
@pytest.mark.parametrize("logging_steps", [1, 3, 8])
def test_a_stop_between_two_lines_changes_no_line(world, tmp_path, kind, logging_steps):
    keys = {**world, **KINDS[kind], "logging_steps": logging_steps}
    whole, folder = tmp_path / "whole", tmp_path / "out"
    expected = luthier.train({**keys, "output_dir": str(whole)})
    stopped_at(4, whole, folder)
    result = luthier.train({**keys, "output_dir": str(folder)})
    assert lines(result.log_history) == lines(expected.log_history)
    logs = [(out / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines() for out in (whole, folder)]
    found, wanted = (lines(map(json.loads, log)) for log in reversed(logs))
    assert found == wanted and "train_loss" in found[-1]


@pytest.mark.parametrize(("key", "step"), [("logging_strategy", 4), ("eval_strategy", 4), ("eval_strategy", 6)])
def test_a_checkpoint_has_the_line_and_the_evaluation_that_end_its_epoch(world, tmp_path, key, step):
    """An epoch has four steps, and the second one ends with the run."""
    keys = {**world, **KINDS["sft lora"], "val_size": 8, "save_steps": 2, "max_steps": 6, key: "epoch"}
    whole, folder = tmp_path / "whole", tmp_path / "out"
    expected = luthier.train({**keys, "output_dir": str(whole)})
    stopped_at(step, whole, folder)
    result = luthier.train({**keys, "output_dir": str(folder)})
    ends = [[line for line in lines(run.log_history) if "train_loss" not in line] for run in (expected, result)]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "kind",
    representatives(
        KINDS,
        "pt full",
        "sft lora",
        "rm oft",
        "dpo qlora",
        "kto freeze",
        "gkd full",
        "sft pissa",
        "sft new rows",
        "sft lora in 16 bits",
        "kto neftune",
    ),
)
def test_resuming_from_output_dir_equals_an_uninterrupted_run(world, whole_run, tmp_path, kind):
    if "quantization_bit" in KINDS[kind]:
        pytest.importorskip(KINDS[kind].get("quantization_method", "bitsandbytes"))
    whole, whole_losses = whole_run(kind)
    assert len(whole_losses) == STEPS
    folder = stopped_at(4, whole, tmp_path / "out")
    result = luthier.train({**world, **KINDS[kind], "output_dir": str(folder)})
    assert_same_end(folder, result, whole, whole_losses)


EARLY = {
    "finetuning_type": "lora",
    "learning_rate": 0.5,
    "eval_dataset": "numbers",
    "eval_strategy": "steps",
    "eval_steps": 1,
    "eval_on_start": True,
    "save_steps": 1,
    "early_stopping_steps": 2,
    "load_best_model_at_end": True,
}
"""Ends early: the weights get worse."""


def test_a_resumed_run_ends_early_at_the_same_step(world, tmp_path, said):
    """The count of evaluations that were not better goes on, and what has ended does not begin again."""
    keys = {**world, **EARLY}
    whole = tmp_path / "whole"
    expected = luthier.train({**keys, "output_dir": str(whole)})
    last = expected.log_history[-1]["step"]
    assert 2 < last < STEPS
    folder = stopped_at(last - 1, whole, tmp_path / "out")
    for step in range(1, last - 1):
        shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    result = luthier.train({**keys, "output_dir": str(folder)})
    assert_same_end(folder, result, whole, losses(expected))
    assert lines(result.log_history) == lines(expected.log_history)
    said.clear()
    again = luthier.train({**keys, "output_dir": str(folder)})
    assert not again.metrics and "nothing was trained" in "".join(said)
    assert f"was not better in 2 evaluations up to step {last}, so training has ended" in "".join(said)
    longer = luthier.train({**keys, "output_dir": str(folder), "early_stopping_steps": 9})
    assert longer.log_history[-1]["step"] == STEPS


def test_a_resumed_run_may_ask_for_an_early_end(world, tmp_path):
    keys = {**world, **EARLY, "output_dir": str(tmp_path / "out")}
    without = {name: value for name, value in keys.items() if name != "early_stopping_steps"}
    luthier.train({**without, "max_steps": 1})
    assert luthier.train(keys).log_history[-1]["step"] < STEPS


def test_two_runs_with_a_longer_second_one(world, tmp_path):
    """Four steps, then the same file with eight: with a constant rate that is one run of eight."""
    values = {**world, **KINDS["sft lora"], "lr_scheduler_type": "constant"}
    whole = luthier.train({**values, "output_dir": str(tmp_path / "whole")})
    luthier.train({**values, "output_dir": str(tmp_path / "out"), "max_steps": 4})
    result = luthier.train({**values, "output_dir": str(tmp_path / "out")})
    assert_same_end(tmp_path / "out", result, tmp_path / "whole", losses(whole))


@pytest.mark.parametrize(("step", "optim"), [(8, "adamw_torch"), (4, "sgd")])
def test_a_run_that_is_resumed_with_more_steps_follows_its_new_schedule(world, tmp_path, step, optim):
    """After 8 of 8 steps the rate is 0; the first of four more steps learns all the same."""
    values = {**world, **KINDS["sft full"], "optim": optim, "output_dir": str(tmp_path / "out")}
    luthier.train({**values, "max_steps": step})
    result = luthier.train({**values, "max_steps": 12})
    rates = [line["learning_rate"] for line in result.log_history if "loss" in line][step:]
    expected = [world["learning_rate"] * (1 + math.cos(math.pi * n / 12)) / 2 for n in range(step, 12)]
    assert rates == pytest.approx(expected)


def test_resuming_within_an_epoch_with_accumulation(world, tmp_path):
    """Five steps of 2 x 2 rows are four rows short of the epoch's end."""
    values = {
        **world,
        **KINDS["sft lora"],
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "save_steps": 5,
    }
    whole = luthier.train({**values, "output_dir": str(tmp_path / "whole")})
    folder = stopped_at(5, tmp_path / "whole", tmp_path / "out")
    result = luthier.train({**values, "output_dir": str(folder)})
    assert_same_end(folder, result, tmp_path / "whole", losses(whole))


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_resuming_within_the_second_epoch_of_rows_by_length(world, tmp_path, strategy):
    """Dropout has used random numbers before that epoch began, and a resumed run does not repeat them."""
    values = {**world, **KINDS["sft lora"], "train_sampling_strategy": strategy, "max_steps": 9, "save_steps": 7}
    whole = luthier.train({**values, "output_dir": str(tmp_path / "whole")})
    folder = stopped_at(7, tmp_path / "whole", tmp_path / "out")
    result = luthier.train({**values, "output_dir": str(folder)})
    assert_same_end(folder, result, tmp_path / "whole", losses(whole))


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({}, None),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, None),
        ({"per_device_train_batch_size": 2}, "rows of a step: 4 there, 2 here"),
        ({"data_seed": 7}, "seed: 42 there, 7 here"),
    ],
)
def test_a_run_that_takes_other_rows_of_the_epoch_is_told(world, whole_run, tmp_path, said, changed, told):
    folder = stopped_at(4, whole_run("sft lora")[0], tmp_path / "out")
    luthier.train({**world, **KINDS["sft lora"], **changed, "max_steps": 5, "output_dir": str(folder)})
    warnings = [line for line in said if "took its rows in other steps or in another order" in line]
    assert len(warnings) == (told is not None) and all(told in line for line in warnings)


def test_resume_from_a_checkpoint_that_is_named(world, whole_run, tmp_path):
    whole, whole_losses = whole_run("sft lora")
    keys = {"resume_from_checkpoint": str(whole / "checkpoint-4"), "output_dir": str(tmp_path / "elsewhere")}
    result = luthier.train({**world, **KINDS["sft lora"], **keys})
    assert_same_end(tmp_path / "elsewhere", result, whole, whole_losses)


@pytest.mark.parametrize("missing", ["trainer_state.json", "half a file", "optimizer.pt"])
def test_a_half_written_newer_checkpoint_is_passed_over(world, whole_run, tmp_path, capsys, missing):
    whole, whole_losses = whole_run("sft lora")
    folder = stopped_at(4, whole, tmp_path / "out")
    broken = folder / "checkpoint-6"
    shutil.copytree(whole / "checkpoint-8", broken)
    if missing == "half a file":
        path = broken / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
    else:
        (broken / missing).unlink()
    result = luthier.train({**world, **KINDS["sft lora"], "output_dir": str(folder)})
    assert f"{broken} is incomplete" in capsys.readouterr().err
    assert_same_end(folder, result, whole, whole_losses)


def test_a_finished_run_started_again_changes_nothing(world, whole_run, tmp_path):
    whole, whole_losses = whole_run("sft full")
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    result = luthier.train({**world, **KINDS["sft full"], "output_dir": str(folder)})
    assert_same_end(folder, result, whole, whole_losses)


DESCRIPTIONS = ("README.md", "run.yaml", "data_report.json", "trainer_state.json")


def test_a_finished_run_started_again_with_other_data_says_that_nothing_was_trained(world, whole_run, tmp_path, said):
    """The files that describe the weights stay those of the run that trained them; new results are covered too."""
    whole, _ = whole_run("sft lora")
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    keys = {**world, **KINDS["sft lora"], "output_dir": str(folder)}
    luthier.train({**keys, "dataset": "tools", "eval_dataset": "numbers", "do_eval": True, "learning_rate": 0.5})
    (warning,) = (text for text in said if "nothing was trained" in text)
    assert "on other data" in warning and "overwrite_output_dir" in warning
    assert {name: (folder / name).read_bytes() for name in DESCRIPTIONS} == {
        name: (whole / name).read_bytes() for name in DESCRIPTIONS
    }
    manifest = read_manifest(folder)
    assert manifest["data"] == read_manifest(whole)["data"]
    assert "eval_results.json" in manifest["files"] and verify_folder(folder) == []


def test_a_finished_run_started_again_does_not_speak_of_other_data(world, whole_run, tmp_path, said):
    whole, _ = whole_run("sft lora")
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    luthier.train({**world, **KINDS["sft lora"], "output_dir": str(folder)})
    (warning,) = (text for text in said if "nothing was trained" in text)
    assert "other data" not in warning


@pytest.mark.parametrize("lost", ["manifest.json", "trainer_state.json", "adapter_model.safetensors"])
def test_a_run_killed_before_its_end_is_described_when_it_is_started_again(world, whole_run, tmp_path, said, lost):
    """It has its last checkpoint, but the files that describe it are not all there yet."""
    whole, _ = whole_run("sft lora")
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    for name in (lost, "README.md"):
        (folder / name).unlink()
    luthier.train({**world, **KINDS["sft lora"], "output_dir": str(folder)})
    assert not any("nothing was trained" in text for text in said)
    assert "fine-tuned by sft (lora)" in (folder / "README.md").read_text()
    assert verify_folder(folder) == []


def test_the_log_of_a_resumed_run_continues_from_the_checkpoint(world, whole_run, tmp_path):
    """The lines after the checkpoint are written again, not twice."""
    import json

    whole, _ = whole_run("sft lora")
    folder = stopped_at(4, whole, tmp_path / "out")
    luthier.train({**world, **KINDS["sft lora"], "output_dir": str(folder)})
    for log in (whole, folder):
        lines = [json.loads(line) for line in (log / "trainer_log.jsonl").read_text().splitlines()]
        assert [line["current_steps"] for line in lines if "loss" in line] == list(range(1, STEPS + 1))


def test_resuming_from_a_weights_only_checkpoint_is_a_warning(world, tmp_path, capsys):
    values = {**world, **KINDS["sft lora"], "output_dir": str(tmp_path / "out"), "save_only_model": True}
    luthier.train({**values, "max_steps": 4})
    assert len(losses(luthier.train(values))) == STEPS
    assert (
        "holds weights only (save_only_model), so optimizer and learning rate schedule restart"
        in capsys.readouterr().err
    )


def test_checkpoints_that_cannot_be_resumed_from_are_named(world, whole_run, tmp_path):
    whole, _ = whole_run("sft lora")
    values = {**world, **KINDS["sft lora"], "output_dir": str(tmp_path / "out")}
    with pytest.raises(OutputError, match="no such folder"):
        luthier.train({**values, "resume_from_checkpoint": str(tmp_path / "nowhere")})
    broken = tmp_path / "checkpoint-3"
    shutil.copytree(whole / "checkpoint-4", broken)
    (broken / "trainer_state.json").unlink()
    with pytest.raises(OutputError, match="incomplete"):
        luthier.train({**values, "resume_from_checkpoint": str(broken)})
    with pytest.raises(OutputError, match="has no complete checkpoint"):
        luthier.train({**values, "resume_from_checkpoint": True})


def test_a_checkpoint_of_a_smaller_model_is_refused(world, whole_run, tmp_path):
    """Two of its three blocks would be resumed, and the third would be untrained."""
    whole, _ = whole_run("sft full")
    deeper = tiny_llama(tmp_path / "deeper", num_hidden_layers=3, max_position_embeddings=1024)
    keys = {**world, **KINDS["sft full"], "model_name_or_path": str(deeper), "output_dir": str(tmp_path / "out")}
    with pytest.raises(RunFailed, match=r"has no weight model\.layers\.2\.\S+ and 8 more -> use the model that"):
        luthier.train({**keys, "resume_from_checkpoint": str(whole / "checkpoint-4")})


@pytest.mark.parametrize("optim", ["sgd", "adafactor"])
def test_a_checkpoint_of_another_optimizer_is_refused(world, whole_run, tmp_path, optim):
    whole, _ = whole_run("sft lora")
    folder = stopped_at(4, whole, tmp_path / "out")
    keys = {**world, **KINDS["sft lora"], "output_dir": str(folder), "optim": optim}
    with pytest.raises(
        OutputError, match=r"checkpoint-4: this checkpoint does not match .*another one saved its state"
    ):
        luthier.train(keys)


def test_finished_weights_without_a_checkpoint_are_not_overwritten(world, whole_run, tmp_path):
    whole, _ = whole_run("sft lora")
    folder = tmp_path / "out"
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    before = (folder / "adapter_model.safetensors").read_bytes()
    with pytest.raises(OutputError, match="already holds weights"):
        luthier.train({**world, **KINDS["sft lora"], "output_dir": str(folder)})
    assert (folder / "adapter_model.safetensors").read_bytes() == before


def test_adapters_of_stacked_experts_resume_too(world, tmp_path):
    from transformers import Qwen3MoeConfig

    from tests.tiny import TINY_LLAMA, save_tiny

    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    config = Qwen3MoeConfig(**{**TINY_LLAMA, "max_position_embeddings": 1024, **sizes, "mlp_only_layers": [0]})
    values = {**world, "finetuning_type": "lora", "model_name_or_path": str(save_tiny(tmp_path / "moe", config))}
    whole = luthier.train({**values, "output_dir": str(tmp_path / "whole")})
    assert any("experts" in name for name in weights(tmp_path / "whole"))
    folder = stopped_at(4, tmp_path / "whole", tmp_path / "out")
    result = luthier.train({**values, "output_dir": str(folder)})
    assert_same_end(folder, result, tmp_path / "whole", losses(whole))


OTHER_DATA: dict[str, dict[str, Any]] = {
    "another dataset": {"dataset": "tools"},
    "fewer rows": {"max_samples": 20},
    "another format": {"template": "vicuna"},
    "a share for evaluation": {"val_size": 4},
}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("other", OTHER_DATA)
@pytest.mark.parametrize("resume", [None, True])
def test_a_run_does_not_go_on_with_other_data_unnoticed(world, whole_run, tmp_path, resume, other):
    whole, _ = whole_run("sft lora")
    folder = stopped_at(4, whole, tmp_path / "out")
    before = files_of(folder)
    keys = {**world, **KINDS["sft lora"], "output_dir": str(folder), "resume_from_checkpoint": resume}
    with pytest.raises(OutputError, match=r"nothing was trained: .*checkpoint-4 was trained on other data") as refusal:
        luthier.train({**keys, **OTHER_DATA[other]})
    (key,) = OTHER_DATA[other]
    assert f"{key}: " in str(refusal.value)
    assert "overwrite_output_dir: true" in str(refusal.value)
    assert files_of(folder) == before


def test_changed_files_are_other_data(world, whole_run, tmp_path):
    whole, _ = whole_run("sft lora")
    folder = stopped_at(4, whole, tmp_path / "out")
    shutil.copytree(world["dataset_dir"], tmp_path / "data")
    path = tmp_path / "data" / "numbers.json"
    path.write_text(path.read_text().replace("number 7", "number seven"))
    keys = {**world, **KINDS["sft lora"], "output_dir": str(folder), "dataset_dir": str(tmp_path / "data")}
    with pytest.raises(OutputError, match="the same keys, other contents"):
        luthier.train(keys)


def test_other_evaluation_rows_are_no_other_data(world, whole_run, tmp_path):
    whole, whole_losses = whole_run("sft lora")
    folder = stopped_at(4, whole, tmp_path / "out")
    keys = {**world, **KINDS["sft lora"], "output_dir": str(folder), "eval_dataset": "tools", "do_eval": True}
    assert_same_end(folder, luthier.train(keys), whole, whole_losses)


def test_a_checkpoint_that_is_named_goes_on_with_other_data_and_the_manifest_says_so(world, whole_run, tmp_path, said):
    whole, _ = whole_run("sft lora")
    folder = tmp_path / "out"
    keys = {**world, **KINDS["sft lora"], "output_dir": str(folder), "dataset": "tools"}
    luthier.train({**keys, "resume_from_checkpoint": str(whole / "checkpoint-4")})
    assert [text for text in said if "was trained on other data" in text and "training continues" in text]
    first, second = read_manifest(folder)["trained_on"]
    assert (first["keys"]["dataset"], first["from_step"]) == ("numbers", 0)
    assert (second["keys"]["dataset"], second["from_step"]) == ("tools", 4)
    assert first["rows"] != second["rows"]
    assert "tools" in (folder / "data_report.json").read_text()
    assert "Up to step 4 it was trained on other rows (numbers)." in (folder / "README.md").read_text()


def test_a_longer_run_on_a_finished_folder_minds_its_data(world, whole_run, tmp_path):
    """More steps are asked for, so it would go on; all that describes the finished run stays."""
    whole, _ = whole_run("sft lora")
    folder = tmp_path / "out"
    shutil.copytree(whole, folder)
    before = files_of(folder)
    keys = {**world, **KINDS["sft lora"], "output_dir": str(folder), "max_steps": STEPS + 2}
    with pytest.raises(OutputError, match="nothing was trained"):
        luthier.train({**keys, "dataset": "tools"})
    assert files_of(folder) == before
    assert len(losses(luthier.train(keys))) == STEPS + 2


@pytest.mark.parametrize("named", [False, True])
def test_a_last_checkpoint_is_not_described_by_data_that_it_has_not_seen(world, whole_run, tmp_path, named):
    """The run was killed before its end, and is started again with other data: there is no step left for them."""
    whole, _ = whole_run("sft lora")
    folder = stopped_at(8, whole, tmp_path / "out")
    before = files_of(folder)
    keys = {**world, **KINDS["sft lora"], "output_dir": str(folder), "dataset": "tools"}
    with pytest.raises(OutputError, match="nothing was trained"):
        luthier.train({**keys, "resume_from_checkpoint": str(folder / "checkpoint-8") if named else None})
    assert files_of(folder) == before


def test_a_stream_does_not_go_on_with_other_files_either(world, tmp_path):
    keys = {**world, **KINDS["sft lora"], "streaming": True, "output_dir": str(tmp_path / "out"), "max_steps": 4}
    luthier.train(keys)
    with pytest.raises(OutputError, match="nothing was trained"):
        luthier.train({**keys, "max_steps": 8, "dataset": "tools"})
    assert len(losses(luthier.train({**keys, "max_steps": 8}))) == 8


def test_a_checkpoint_of_an_earlier_version_does_not_say(world, whole_run, tmp_path):
    import json

    whole, _ = whole_run("sft lora")
    folder = stopped_at(4, whole, tmp_path / "out")
    path = folder / "checkpoint-4" / "trainer_state.json"
    state = json.loads(path.read_text())
    assert state["stateful_callbacks"].pop("trained_on")
    path.write_text(json.dumps(state))
    write_manifest(folder / "checkpoint-4")
    result = luthier.train({**world, **KINDS["sft lora"], "output_dir": str(folder), "dataset": "tools"})
    assert len(losses(result)) == STEPS and "trained_on" not in read_manifest(folder)
