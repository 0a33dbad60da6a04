"""Faults of the output folder: what stands there is never written over, and a bad place is told before any work."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

import luthier


@pytest.fixture(scope="module")
def finished(small_keys, tmp_path_factory) -> Path:
    """The folder of a LoRA run with the checkpoints 2 and 4; read-only for tests."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    keys = {"finetuning_type": "lora", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    luthier.train({**small_keys, **keys, "output_dir": str(folder)})
    return folder


LORA: dict[str, Any] = {"finetuning_type": "lora", "max_steps": 6, "save_strategy": "steps", "save_steps": 2}


def copied(source: Path, person, *, leave_out: str = "") -> None:
    shutil.copytree(source, person.out, ignore=shutil.ignore_patterns(leave_out))


def test_output_dir_that_holds_weights(person, finished):
    copied(finished, person, leave_out="checkpoint-*")
    said = person.is_refused(**LORA)
    assert f"output_dir: {person.out} already holds weights (adapter_model.safetensors)" in said
    assert "choose another folder, or set overwrite_output_dir: true" in said


def test_a_run_that_fails_early_writes_over_nothing_even_if_it_may(person, finished):
    copied(finished, person)
    may = {**LORA, "overwrite_output_dir": True}
    person.is_refused(**may, dataset="nothing")
    person.is_refused(**may, cutoff_len=1)
    person.is_refused(**may, lora_target="nothing")
    person.is_refused(**may, lr_scheduler_type="cosine_with_min_lr")


@pytest.mark.parametrize("changes", [{}, {"overwrite_output_dir": True}])
def test_output_dir_is_the_folder_of_the_model(person, model, changes):
    said = person.is_refused(model_name_or_path=str(model), output_dir=str(model), **changes)
    assert str(model) in said
    assert "already holds weights" in said or "this is the folder of" in said


def test_output_dir_whose_checkpoint_is_read(person, finished):
    """Starting from scratch would remove the checkpoint that the run starts from."""
    copied(finished, person)
    source = str(person.out / "checkpoint-2")
    said = person.is_refused(**LORA, adapter_name_or_path=source, overwrite_output_dir=True)
    assert f"output_dir: {source}: this is the folder of {source}, which is read here -> name a new folder" in said


@pytest.mark.parametrize("place", ["/proc/luthier/out", "/sys/luthier"])
def test_output_dir_that_cannot_be_written(person, place):
    if not Path(place).parents[-2].is_dir():
        pytest.skip("this system has no such folder")
    said = person.is_refused(output_dir=place)
    assert f"output_dir: {place}: nothing can be written there (" in said
    assert "choose another folder" in said
    path = person.run_file(f"model_name_or_path: {person.keys['model_name_or_path']}\ntemplate: chatml\n")
    assert f"export_dir: {place}: nothing" in person.is_refused_words("export", path, f"export_dir={place}")


def test_output_dir_that_is_a_file_or_below_one(person):
    file = Path(person.run_file())
    assert "this is a file -> name a new folder" in person.is_refused(output_dir=str(file))
    assert "nothing can be written there" in person.is_refused(output_dir=str(file / "out"))


def test_export_dir_that_is_taken(person, model):
    path = person.run_file(f"model_name_or_path: {model}\ntemplate: chatml\n")
    assert "this is the folder of" in person.is_refused_words("export", path, f"export_dir={model}")
    assert "this is a file" in person.is_refused_words("export", path, f"export_dir={path}")
    taken = shutil.copytree(model, person.folder / "taken")
    said = person.is_refused_words("export", path, f"export_dir={taken}")
    assert "holds weights already (model.safetensors) -> name a new folder" in said
    assert "export_dir: is missing" in person.is_refused_words("export", path)


@pytest.mark.parametrize("asked", ["checkpoint-9", "checkpoint-4", "."])
def test_resuming_from_an_incomplete_checkpoint(person, finished, asked):
    copied(finished, person)
    weights = person.out / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    said = person.is_refused(**LORA, resume_from_checkpoint=str(person.out / asked))
    assert re.search(f"resume_from_checkpoint: '?{re.escape(str(person.out / asked))}'?: ", said)
    hints = {
        "checkpoint-9": "there is no such folder -> choose one of checkpoint-2, checkpoint-4",
        "checkpoint-4": "the checkpoint is incomplete -> choose an earlier one",
        ".": f"did you mean {person.out}/checkpoint-2?",
    }
    assert hints[asked] in said


def test_resuming_where_nothing_was_saved(person):
    assert "has no complete checkpoint -> leave it out to start from scratch" in person.is_refused(
        resume_from_checkpoint=True
    )


def test_resuming_into_a_folder_with_other_weights(person, finished):
    copied(finished, person, leave_out="checkpoint-*")
    said = person.is_refused(**LORA, resume_from_checkpoint=str(finished / "checkpoint-2"))
    assert "already holds weights" in said


@pytest.mark.parametrize(
    "changes", [{"lora_rank": 4}, {"lora_target": "q_proj"}, {"finetuning_type": "full"}], ids=lambda c: next(iter(c))
)
def test_resuming_from_a_checkpoint_of_another_kind_of_run(person, finished, changes):
    copied(finished, person)
    before = (person.out / "checkpoint-4" / "manifest.json").read_text()
    said = person.trains(**{**LORA, **changes}).complaint(2)
    assert f"{person.out}/checkpoint-4: this checkpoint does not match the run (" in said
    assert (person.out / "checkpoint-4" / "manifest.json").read_text() == before
    assert person.types("verify", str(person.out / "checkpoint-4")).status == 0


def test_a_torn_checkpoint_is_passed_over(person, finished):
    copied(finished, person)
    (person.out / "checkpoint-4" / "optimizer.pt").write_bytes(b"torn")
    outcome = person.trains(**LORA)
    assert outcome.status == 0
    assert f"{person.out}/checkpoint-4 is incomplete and is not used" in outcome.err
    assert f"resuming from {person.out}/checkpoint-2" in outcome.err
    steps = [json.loads(line)["current_steps"] for line in (person.out / "trainer_log.jsonl").read_text().splitlines()]
    assert steps[:6] == [1, 2, 3, 4, 5, 6]
    assert person.types("verify", str(person.out / "checkpoint-4")).status == 0, "written anew"


def test_a_non_finite_weight_is_not_saved(person, finished):
    """The loss is logged rarely, and looked at after every step."""
    copied(finished, person)
    weights = (person.out / "adapter_model.safetensors").read_bytes()
    wild = {"learning_rate": 1e30, "logging_steps": 100, "overwrite_output_dir": True, "save_strategy": "no"}
    said = person.trains(**{**LORA, **wild}).complaint(1)
    assert f"the loss became nan at step 2; the last good checkpoint is {person.out / 'checkpoint-4'} -> lower" in said
    assert (person.out / "adapter_model.safetensors").read_bytes() == weights
    for step in (2, 4):
        assert person.types("verify", str(person.out / f"checkpoint-{step}")).status == 0


def test_a_non_finite_loss_stops_the_run(person):
    said = person.trains(learning_rate=1e30, max_steps=6).complaint(1)
    assert "the loss became nan at step" in said
    assert not list(person.out.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["mit leer ünï-模型", "a'b\"c=d", "[x] $HOME #1"])
def test_any_name_will_do(person, model, name):
    """Blanks, other scripts, quotes and what a shell or a pattern would take for something else."""
    base = Path(shutil.copytree(model, person.folder / name / "model"))
    data = shutil.copytree(person.keys["dataset_dir"], person.folder / name / "data")
    out = person.folder / name / "out"
    outcome = person.trains(
        model_name_or_path=str(base), dataset_dir=str(data), output_dir=str(out), max_steps=1,
        save_strategy="steps", save_steps=1,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert (out / "checkpoint-1" / "manifest.json").is_file()
    assert person.types("verify", str(out)).status == 0
    outcome = person.trains(
        model_name_or_path=str(base), dataset_dir=str(data), output_dir=str(out), max_steps=2,
    )  # fmt: skip
    assert f"resuming from {out}/checkpoint-1" in outcome.err
