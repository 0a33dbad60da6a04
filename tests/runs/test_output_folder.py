"""What a run leaves in output_dir: the files users know, whole, readable by peft and transformers without luthier."""

import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import luthier
from luthier.cli import main
from luthier.config.load import load_infer, load_train
from luthier.core.errors import OutputError
from luthier.model.backends import load_for_inference
from luthier.training.trainer import StageTrainer
from luthier.workflow.training import claimed
from tests.small_world import losses, small_world

TEXT_SIDE = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
REPORTS = {
    "README.md",
    "run.yaml",
    "trainer_log.jsonl",
    "trainer_state.json",
    "train_results.json",
    "eval_results.json",
    "all_results.json",
    "data_report.json",
    "manifest.json",
    "training_loss.png",
    "training_eval_loss.png",
    "training_eval_accuracy.png",
    "training_grad_norm.png",
    "training_args.bin",
}
WEIGHTS = {
    "lora": {"adapter_model.safetensors", "adapter_config.json"},
    "full": {"model.safetensors", "config.json", "generation_config.json"},
}
STATE = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "manifest.json"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("world"))
    return {
        **values,
        "disable_shuffling": False,
        "overwrite_output_dir": False,
        "plot_loss": True,
        "eval_dataset": "tools",
        "do_eval": True,
        "compute_accuracy": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 3,
        "cutoff_len": 200,
    }


@pytest.fixture(scope="module")
def run_of(world, tmp_path_factory):
    """finetuning_type -> (folder, result), each made once."""
    made: dict[str, tuple[Path, Any]] = {}

    def make(finetuning_type: str) -> tuple[Path, Any]:
        if finetuning_type not in made:
            folder = tmp_path_factory.mktemp("run") / "out put"
            values = {**world, "finetuning_type": finetuning_type, "output_dir": str(folder)}
            made[finetuning_type] = folder, luthier.train(values)
        return made[finetuning_type]

    return make


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("finetuning_type", WEIGHTS)
def test_exactly_these_files_are_left(run_of, finetuning_type):
    folder, _ = run_of(finetuning_type)
    weights = WEIGHTS[finetuning_type]
    assert {p.name for p in folder.iterdir()} == weights | TEXT_SIDE | REPORTS | {"checkpoint-3", "checkpoint-6"}
    card = {"README.md"} if finetuning_type == "lora" else set()  # peft writes one into every checkpoint
    for checkpoint in (folder / "checkpoint-3", folder / "checkpoint-6"):
        assert {p.name for p in checkpoint.iterdir()} == weights | TEXT_SIDE | STATE | card
        assert not card or "library_name: peft" in (checkpoint / "README.md").read_text()


@pytest.mark.parametrize("finetuning_type", WEIGHTS)
def test_the_manifest_describes_all_of_it(run_of, finetuning_type, capsys):
    folder, _ = run_of(finetuning_type)
    for part in (folder, folder / "checkpoint-3"):
        names = {p.name for p in part.iterdir() if p.is_file()} - {"manifest.json"}
        manifest = read_json(part / "manifest.json")
        assert set(manifest["files"]) == names
        assert main(["verify", str(part)]) == 0
    manifest = read_json(folder / "manifest.json")
    assert manifest["seed"] == 42
    assert len(manifest["data"]) == 64
    assert {"luthier", "torch", "transformers", "peft"} <= set(manifest["versions"])
    capsys.readouterr()


def test_the_log_has_one_line_per_logged_step(run_of):
    folder, result = run_of("lora")
    lines = [json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    names = {"current_steps", "total_steps", "loss", "lr", "epoch", "percentage", "elapsed_time", "remaining_time"}
    assert all(names | {"throughput", "grad_norm"} == set(line) for line in steps)
    assert [line["current_steps"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in steps] == losses(result)
    assert [line["percentage"] for line in steps] == [16.67, 33.33, 50.0, 66.67, 83.33, 100.0]
    assert [line["lr"] for line in steps] == pytest.approx([1e-2 * (6 - step) / 6 for step in range(6)])
    assert all(line["total_steps"] == 6 and line["throughput"] > 0 for line in steps)
    assert all(line["elapsed_time"].count(":") == 2 == line["remaining_time"].count(":") for line in steps)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["current_steps"] for line in evaluations] == [2, 4, 6, 6]
    assert all(0 <= line["eval_accuracy"] <= 1 for line in evaluations)


def test_results_and_state(run_of):
    folder, result = run_of("lora")
    train, evaluation = read_json(folder / "train_results.json"), read_json(folder / "eval_results.json")
    assert {"train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second", "epoch"} <= set(train)
    assert train["train_loss"] == pytest.approx(sum(losses(result)) / 6)
    assert {"eval_loss", "eval_accuracy", "eval_runtime", "epoch"} <= set(evaluation)
    assert read_json(folder / "all_results.json") == train | evaluation
    state = read_json(folder / "trainer_state.json")
    assert [logs["loss"] for logs in state["log_history"] if "loss" in logs] == losses(result)
    assert state["global_step"] == 6
    assert (folder / "training_loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_model_card_names_base_data_and_keys(run_of, world):
    folder, _ = run_of("lora")
    _, header, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    facts = yaml.safe_load(header)
    assert facts["base_model"] == world["model_name_or_path"]
    assert facts["library_name"] == "peft"
    assert facts["datasets"] == ["numbers"]
    assert {"luthier", "sft", "lora"} <= set(facts["tags"])
    assert "| learning_rate | 0.01 |" in body and "eval_loss" in body


def test_the_data_report_adds_up(run_of):
    folder, _ = run_of("lora")
    report = read_json(folder / "data_report.json")
    assert set(report["datasets"]) == {"numbers", "tools"}
    for account in report["datasets"].values():
        assert account["rows_in"] == account["kept"] + sum(account["dropped"].values()) == 24
    tools = report["datasets"]["tools"]
    assert 0 < tools["truncated"] <= tools["kept"]
    assert report["samples"] == {"train": 24, "eval": tools["kept"]}


@pytest.mark.parametrize("finetuning_type", WEIGHTS)
def test_run_yaml_repeats_the_run(run_of, tmp_path, finetuning_type):
    folder, _ = run_of(finetuning_type)
    again = tmp_path / "again"
    assert main(["train", str(folder / "run.yaml"), f"output_dir={again}"]) == 0
    numbers = ("loss", "eval_loss", "eval_accuracy", "learning_rate", "grad_norm", "epoch", "step")
    first, second = (
        [[logs.get(name) for name in numbers] for logs in read_json(part / "trainer_state.json")["log_history"]]
        for part in (folder, again)
    )
    assert first == second
    for name in WEIGHTS[finetuning_type]:
        if name.endswith(".safetensors"):
            assert (folder / name).read_bytes() == (again / name).read_bytes()
    assert read_json(folder / "manifest.json")["data"] == read_json(again / "manifest.json")["data"]


def test_run_yaml_has_the_keys_in_effect(world, tmp_path):
    """A null that is not the default stays, defaults that decide the numbers are written out, secrets are not."""
    values = {**world, "output_dir": str(tmp_path / "out"), "enable_thinking": None, "hf_hub_token": "hf_secret"}
    luthier.train({**values, "max_steps": 1, "eval_strategy": "no", "do_eval": False, "plot_loss": False})
    text = (tmp_path / "out" / "run.yaml").read_text(encoding="utf-8")
    keys = yaml.safe_load(text)
    assert keys["enable_thinking"] is None and keys["dataset"] == ["numbers"]
    assert (keys["seed"], keys["weight_decay"], keys["max_grad_norm"]) == (42, 0.0, 1.0)
    assert "secret" not in text and "hf_hub_token" not in keys
    again, first = load_train(tmp_path / "out" / "run.yaml"), load_train(values)
    assert (again.data, again.method, again.adapter) == (first.data, first.method, first.adapter)
    assert again.generating == first.generating
    assert again.finetuning == dataclasses.replace(first.finetuning, plot_loss=False)


def test_the_plot_has_two_ends_whatever_logging_steps_is(world, tmp_path):
    keys = {"max_steps": 4, "eval_strategy": "no", "do_eval": False, "save_strategy": "no"}
    found = {}
    for plots in (True, False):
        values = {**world, **keys, "plot_loss": plots, "output_dir": str(tmp_path / f"{plots}"), "logging_steps": 500}
        found[plots] = luthier.train(values)
    logged = [logs for logs in found[True].log_history if "loss" in logs]
    assert [logs["step"] for logs in logged] == [1, 4]
    assert (tmp_path / "True" / "training_loss.png").exists()
    assert losses(found[False]) == [] and not (tmp_path / "False" / "training_loss.png").exists()
    means = [read_json(tmp_path / name / "train_results.json")["train_loss"] for name in ("True", "False")]
    assert means[0] == pytest.approx(means[1], rel=1e-6)
    assert (logged[0]["loss"] + 3 * logged[1]["loss"]) / 4 == pytest.approx(means[0], rel=1e-3)


PLAIN_CODE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, full, written = sys.argv[1:]
ids = torch.arange(30)[None]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
logits = {"lora": model(ids).logits}
model = AutoModelForCausalLM.from_pretrained(full).eval()
assert model.dtype == torch.float32
logits["full"] = model(ids).logits
chat = [{"role": "user", "content": "hi"}]
for folder in (adapter, full):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\\nhi<|im_end|>\\n<|im_start|>assistant\\n"
    assert tokenizer.eos_token == "<|im_end|>"
torch.save(logits, written)
assert not any(name.partition(".")[0] == "luthier" for name in sys.modules)
"""


@pytest.mark.thorough
def test_peft_and_transformers_load_it_without_luthier(run_of, world, tmp_path):
    folders = {finetuning_type: run_of(finetuning_type)[0] for finetuning_type in WEIGHTS}
    words = [world["model_name_or_path"], str(folders["lora"]), str(folders["full"]), str(tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", PLAIN_CODE, *words], check=True, cwd=tmp_path)
    theirs = torch.load(tmp_path / "logits.pt")
    # luthier merges adapters to answer, which rounds differently.
    for finetuning_type, tolerance in (("lora", 1e-4), ("full", 0.0)):
        difference = ours(world, folders[finetuning_type], finetuning_type) - theirs[finetuning_type]
        assert difference.abs().max() <= tolerance


def ours(world: dict[str, Any], folder: Path, finetuning_type: str) -> torch.Tensor:
    """Logits of the model as luthier loads it for answers."""
    keys = {"template": "chatml", "model_name_or_path": str(folder)}
    if finetuning_type == "lora":
        keys |= {"model_name_or_path": world["model_name_or_path"], "adapter_name_or_path": str(folder)}
    model = load_for_inference(load_infer(keys))
    with torch.no_grad():
        return model(torch.arange(30)[None]).logits


def test_a_new_run_leaves_nothing_of_the_one_it_replaces(world, tmp_path):
    """overwrite_output_dir: another kind of weights, fewer steps, no evaluation."""
    values = {**world, "output_dir": str(tmp_path / "out"), "overwrite_output_dir": True}
    luthier.train({**values, "finetuning_type": "full"})
    quiet = {"do_eval": False, "eval_strategy": "no", "eval_dataset": None, "compute_accuracy": False}
    reports = {name for name in REPORTS if "eval" not in name}
    for steps, saves in (
        ({"max_steps": 4, "save_steps": 2}, {"checkpoint-2", "checkpoint-4"}),
        ({"save_strategy": "no"}, set()),
    ):
        luthier.train({**values, **quiet, "finetuning_type": "lora", **steps})
        names = {p.name for p in (tmp_path / "out").iterdir()}
        assert names == WEIGHTS["lora"] | TEXT_SIDE | reports | saves
        assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_second_run_in_the_folder_is_refused_and_costs_the_first_nothing(world, tmp_path, monkeypatch):
    """It may not even look for its checkpoint: that may be superseded when the first has ended."""
    values = {**world, "output_dir": str(tmp_path / "out"), "do_eval": False, "eval_strategy": "no", "plot_loss": False}
    step, refused = StageTrainer.training_step, []

    def changes() -> dict[Path, int]:
        paths = (path for path in (tmp_path / "out").rglob("*") if "heartbeat" not in path.name)
        return {path: path.stat().st_mtime_ns for path in paths}

    def disturbed(trainer: StageTrainer, *arguments: Any, **more: Any) -> torch.Tensor:
        if trainer.state.global_step == 4:
            before = changes()
            with ThreadPoolExecutor(1) as thread:
                refused.append(thread.submit(luthier.train, {**values, "overwrite_output_dir": True}).exception())
            assert changes() == before
        return step(trainer, *arguments, **more)

    monkeypatch.setattr(StageTrainer, "training_step", disturbed)
    result = luthier.train(values)
    assert isinstance(refused[0], OutputError) and "another run is going on in this folder" in str(refused[0])
    assert len(losses(result)) == 6 and main(["verify", str(tmp_path / "out")]) == 0


def test_only_the_first_process_of_a_run_claims_its_folder(tmp_path, monkeypatch):
    with claimed(tmp_path / "out"):
        monkeypatch.setenv("RANK", "1")
        with claimed(tmp_path / "out"):
            pass
