"""Runs on images, from dataset_info.json to weights: every family, every stage, several processes, resuming."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import luthier
from luthier.core.errors import DataError, ModelError
from tests.matrix import representatives
from tests.media_models import SAMPLING, SHORT_RUN, draw, talk
from tests.runs.test_processes import start_two
from tests.torchvision_models import FAMILIES

ANSWERS = ("red", "a green one", "blue")
NUM_ROWS = 12
TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
STAGES: dict[str, dict[str, Any]] = {
    "rm": {"stage": "rm", "dataset": "pairs"},
    "dpo": {"stage": "dpo", "dataset": "pairs"},
    "orpo": {"stage": "dpo", "pref_loss": "orpo", "dataset": "pairs"},
    "kto": {"stage": "kto", "dataset": "feedback"},
    "gkd": {"stage": "gkd"},
    "gkd own answers": {"stage": "gkd", "gkd_lambda": 1.0, "max_new_tokens": 4},
    "ppo": {"stage": "ppo", "max_new_tokens": 6, "ppo_epochs": 2},
    "grpo": {"stage": "grpo", "num_generations": 4, "num_iterations": 2, "grpo_beta": 0.1, "max_new_tokens": 6},
}
EYES = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}


def more_images_and_letters(completions: list[str], images: list[list[str]]) -> list[float]:
    """A reward for tests, which sees the paths of the images of each prompt."""
    assert all(Path(path).is_file() for paths in images for path in paths)
    return [len(paths) + len(answer) % 5 for answer, paths in zip(completions, images, strict=True)]


def world(folder: Path, family: str) -> dict[str, Any]:
    """Writes a model, images and data below `folder` and returns the keys that every run shares. Rows have one, two and
    no images, in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    FAMILIES[family](folder / "model")
    rows = []
    for number in range(NUM_ROWS):
        sizes = [
            ((28, 56, 30)[(number + n) % 3], (84, 28, 60)[(2 * number + n) % 3]) for n in range((1, 2, 0)[number % 3])
        ]
        images = [
            draw(folder / f"{number}_{n}.png", height=height, width=width, seed=number).name
            for n, (height, width) in enumerate(sizes)
        ]
        question = {"role": "user", "content": "<image>" * len(images) + f"what is {number}?"}
        rows.append({"messages": [question, {"role": "assistant", "content": ANSWERS[number % 3]}], "images": images})
    pairs = [
        {
            "messages": row["messages"][:1],
            "chosen": row["messages"][1],
            "rejected": {"role": "assistant", "content": "no" + "!" * (number % 4)},
            "images": row["images"],
        }
        for number, row in enumerate(rows)
    ]
    feedback = [{**row, "good": bool(number % 2)} for number, row in enumerate(rows)]
    texts = [{**row, "messages": [{**row["messages"][0], "content": "hi"}, row["messages"][1]]} for row in rows]
    columns = {"messages": "messages", "images": "images"}
    shared = {"formatting": "sharegpt", "columns": columns, "tags": TAGS}
    info = {
        "rows": shared | {"file_name": "rows.json"},
        "pairs": shared
        | {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": columns | {"chosen": "chosen", "rejected": "rejected"},
        },
        "feedback": shared | {"file_name": "feedback.json", "columns": columns | {"kto_tag": "good"}},
        "texts": shared | {"file_name": "texts.json", "columns": {"messages": "messages"}},
    }
    for name, content in (("rows", rows), ("pairs", pairs), ("feedback", feedback), ("texts", texts)):
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return {
        "model_name_or_path": str(folder / "model"),
        "dataset_dir": str(folder),
        "media_dir": str(folder),
        "dataset": "rows",
        **SHORT_RUN,
        "cutoff_len": 512,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        **SAMPLING,
    }


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made: dict[str, dict[str, Any]] = {}

    def of(family: str) -> dict[str, Any]:
        if family not in made:
            made[family] = world(tmp_path_factory.mktemp(family) / "w", family)
        return made[family]

    return of


def losses(result: Any) -> list[float]:
    return [logs["loss"] for logs in result.log_history if "loss" in logs]


@pytest.mark.parametrize("family", representatives(FAMILIES, "paddleocr_vl", "gemma3"))
def test_a_model_of_each_family_learns_from_images(worlds, family, tmp_path):
    found = losses(luthier.train({**worlds(family), **EYES, "output_dir": str(tmp_path)}))
    assert found[-1] < found[0] - 0.5
    before = load_file(Path(worlds(family)["model_name_or_path"]) / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    changed = [name for name in after if not torch.equal(after[name], before[name])]
    assert any("vision" in name or "visual" in name for name in changed)
    assert len(AutoProcessor.from_pretrained(tmp_path)(text=["hi"])["input_ids"][0]) == 2


@pytest.mark.parametrize(
    ("stage", "family"),
    representatives(
        [(stage, family) for stage in STAGES for family in ("llava", "paddleocr_vl", "gemma3")],
        *(("kto", "paddleocr_vl"), ("grpo", "llava"), ("rm", "gemma3")),
    ),
)
def test_every_stage_sees_images(worlds, stage, family, tmp_path):
    keys = {**worlds(family), **STAGES[stage], "output_dir": str(tmp_path), "max_steps": 2}
    if keys["stage"] == "gkd":
        keys["teacher_model"] = keys["model_name_or_path"]
    if keys["stage"] in ("ppo", "grpo"):
        keys["reward_funcs"] = "tests.runs.test_images:more_images_and_letters"
    if stage == "rm" and family != "gemma3":
        with pytest.raises(ModelError, match="transformers has no class for a reward model of the type"):
            luthier.train(keys)
        return
    assert len(losses(luthier.train(keys))) == 2


def answer_logps(model: Any, processor: Any, row: dict[str, Any], answer: str, folder: Path) -> torch.Tensor:
    """The log-probability of an answer by transformers alone, from the batch that its processor makes."""
    question = row["messages"][0]["content"].replace("<image>", "")
    messages = talk(question, answer, [folder / name for name in row["images"]])
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    whole = processor.apply_chat_template(messages, **options)
    prompt = processor.apply_chat_template(messages[:1], add_generation_prompt=True, **options)["input_ids"].shape[1]
    logits = model(**whole).logits[0, prompt - 1 : -1].log_softmax(-1)
    return logits.gather(-1, whole["input_ids"][0, prompt:, None]).sum()


@pytest.mark.parametrize("family", representatives(("paddleocr_vl", "gemma3", "idefics3"), "paddleocr_vl"))
def test_a_step_of_dpo_is_that_of_plain_transformers(worlds, family, tmp_path):
    """At the start the log-ratios are 0, so the gradient is -beta / 2 (grad log p(chosen) - grad log p(rejected))."""
    keys, beta, rate, batch = worlds(family), 0.5, 0.1, 4
    more = {"pref_beta": beta, "max_steps": 1, "learning_rate": rate, "optim": "sgd", "max_grad_norm": 0.0}
    steady = {"lr_scheduler_type": "constant", "disable_shuffling": True, "output_dir": str(tmp_path)}
    luthier.train({**keys, **EYES, **STAGES["dpo"], **more, **steady})
    folder = Path(keys["dataset_dir"])
    model = AutoModelForImageTextToText.from_pretrained(keys["model_name_or_path"])
    processor = AutoProcessor.from_pretrained(keys["model_name_or_path"])
    total = 0.0
    for row in json.loads((folder / "pairs.json").read_text())[:batch]:
        for part, sign in (("chosen", 1), ("rejected", -1)):
            total = total - sign * beta / 2 * answer_logps(model, processor, row, row[part]["content"], folder) / batch
    total.backward()
    after = load_file(tmp_path / "model.safetensors")
    for name, weight in model.named_parameters():
        if name in after and weight.grad is not None:
            torch.testing.assert_close(after[name], (weight - rate * weight.grad).detach(), rtol=1e-4, atol=2e-6)


def test_a_resumed_run_with_workers_ends_with_the_same_bits(worlds, tmp_path):
    keys = {**worlds("paddleocr_vl"), **EYES, "dataloader_num_workers": 2, "save_strategy": "steps", "save_steps": 2}
    luthier.train({**keys, "output_dir": str(tmp_path / "whole")})
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    luthier.train({**keys, "output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": checkpoint})
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_image_replaced_after_preparation_is_named(worlds, tmp_path, monkeypatch):
    keys = {**worlds("idefics3"), "output_dir": str(tmp_path), "dataloader_num_workers": 1}
    path = Path(keys["dataset_dir"]) / "0_0.png"
    kept = path.read_bytes()
    monkeypatch.setattr("luthier.workflow.training.report_data", lambda *given: draw(path, height=84, width=30))
    try:
        with pytest.raises(
            DataError,
            match=r"0_0\.png: this image has changed .* it is now 84x30 pixels and \d+ tokens, and was 28x84 pixels",
        ):
            luthier.train(keys)
    finally:
        path.write_bytes(kept)


def test_without_images_the_tower_stays_frozen_and_this_is_said(worlds, tmp_path, capsys):
    keys = {**worlds("llava"), **EYES, "dataset": "texts", "output_dir": str(tmp_path), "max_steps": 1}
    luthier.train(keys)
    assert "(no dataset of this run has images)" in capsys.readouterr().err
    before = load_file(Path(keys["model_name_or_path"]) / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in after if "vision_tower" in name)


@pytest.mark.parametrize("family", representatives(FAMILIES, "idefics3"))
def test_answers_of_a_batch_are_those_of_each_prompt_alone(worlds, family, tmp_path):
    keys = {**worlds(family), "do_train": False, "do_predict": True, "predict_with_generate": True, "do_sample": False}
    answers = []
    for size in (5, 1):
        more = {"dataset": None, "eval_dataset": "rows", "per_device_eval_batch_size": size, "max_new_tokens": 6}
        luthier.train({**keys, **more, "output_dir": str(tmp_path / str(size))})
        lines = (tmp_path / str(size) / "generated_predictions.jsonl").read_text(encoding="utf-8").splitlines()
        answers.append([json.loads(line)["predict"] for line in lines])
    assert len(answers[0]) == NUM_ROWS and answers[0] == answers[1]


@pytest.mark.thorough
def test_two_processes_train_a_tower_though_one_of_them_has_no_image(worlds, tmp_path):
    """Each batch has two rows, and every third row has no image. The weights are those of one process."""
    keys = {**worlds("paddleocr_vl"), **EYES, "disable_shuffling": True, "optim": "sgd", "learning_rate": 0.1}
    luthier.train({**keys, "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "one")})
    run_file = tmp_path / "run.yaml"
    two = {**keys, "per_device_train_batch_size": 1, "output_dir": str(tmp_path / "two")}
    run_file.write_text(yaml.safe_dump(two), encoding="utf-8")
    done = start_two(run_file)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "a batch without images gets a small one without content" in done.stderr
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "share"), representatives([("dpo", 2), ("orpo", 2), ("kto", 2), ("grpo", 4)], ("kto", 2), ("grpo", 4))
)
def test_the_tower_runs_once_for_all_rows_that_show_an_image(worlds, stage, share, tmp_path, monkeypatch, capsys):
    """Before training, the model is tried on 3 images for concatenation, and on 5 for sharing."""
    from transformers.models.llava.modeling_llava import LlavaModel

    own, seen = LlavaModel.get_image_features, []

    @functools.wraps(own)
    def counting(self, pixel_values, **more):
        if not pixel_values.is_meta:  # the plan traces it without numbers
            seen.append(len(pixel_values))
        return own(self, pixel_values, **more)

    monkeypatch.setattr(LlavaModel, "get_image_features", counting)
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    keys = {**worlds("llava"), **STAGES[stage], "max_steps": 2, "overwrite_cache": True}
    if stage == "grpo":
        keys["reward_funcs"] = "tests.runs.test_images:more_images_and_letters"
    found = {}
    for fast in (False, True):
        seen.clear()
        result = luthier.train({**keys, "fast_path": fast, "output_dir": str(tmp_path / str(fast))})
        found[fast] = losses(result), sum(seen)
    assert "images are encoded once for all rows of a batch that show them" in capsys.readouterr().err
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-4, abs=1e-6)
    assert (found[True][1] - 3 - 5) * share <= found[False][1] - 3
