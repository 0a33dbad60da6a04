"""A disk that fills up: a real small disk where mounting is allowed, and a limit on the size of files everywhere."""

import json
import re
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.matrix import representatives
from tests.runs.bad_input.clumsy import contents

STEPWISE = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6}
REMEDY = "-> free some space or choose another"


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing further fails with EFBIG, as a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# From the first file of the second checkpoint to its last: weights, tokenizer, optimizer, state, manifest.
@pytest.mark.parametrize("size", representatives([1700, 1900, 1912, 2400, 2840], 1912))
def test_full_while_saving_a_checkpoint(person, small_disk, size):
    """Training goes on, with the checkpoint that there is; whether the final weights fit is another matter."""
    out = small_disk(size) / "out"
    outcome = person.trains(output_dir=str(out), **STEPWISE)
    assert outcome.status == (size < 2800), outcome.err
    for step in range(2, 7):
        assert f"warning: cannot save to {out}/checkpoint-{step}: " in outcome.err
    assert outcome.err.count(f"the last complete checkpoint is {out}/checkpoint-1; training goes on -> free") == 5
    assert [path.name for path in out.glob("*checkpoint*")] == ["checkpoint-1"]
    assert person.types("verify", str(out / "checkpoint-1")).status == 0
    lines = (out / "trainer_log.jsonl").read_text().splitlines()
    assert {json.loads(line)["current_steps"] for line in lines} == {1, 2, 3, 4, 5, 6}


def test_resuming_when_there_is_space_again(person, small_disk):
    out = small_disk(1700) / "out"
    assert REMEDY in person.trains(output_dir=str(out), **STEPWISE).complaint(1)
    subprocess.run(["mount", "-o", "remount,size=2000k", str(out.parent)], check=True)
    outcome = person.trains(output_dir=str(out), **{**STEPWISE, "max_steps": 3, "save_strategy": "no"})
    assert outcome.status == 0, outcome.err
    assert f"resuming from {out}/checkpoint-1" in outcome.err
    assert person.types("verify", str(out)).status == 0


def test_too_small_for_the_weights_from_the_start(person, small_disk):
    out = small_disk(300) / "out"
    said = person.trains(output_dir=str(out)).complaint(2)
    assert re.search(r"the weights will take 0\.460 MB, and only 0\.30\d MB are free there", said)
    assert not contents(out)


@pytest.mark.parametrize("size", [456])
def test_full_while_saving_the_final_weights(person, small_disk, size):
    out = small_disk(size) / "out"
    said = person.trains(output_dir=str(out)).complaint(1)
    assert f"cannot save to {out}: No space left on device; no checkpoint was saved before {REMEDY}" in said
    assert not [path for path in out.iterdir() if path.name not in ("data_report.json", "trainer_log.jsonl")]


@pytest.mark.parametrize("size", [472, 480])
def test_weights_stay_if_the_disk_is_full_after_them(person, small_disk, size):
    from safetensors.torch import load_file

    out = small_disk(size) / "out"
    said = person.trains(output_dir=str(out)).complaint(1)
    assert f"{out}: the weights are saved, but not " in said and "the disk may be full" in said
    assert sum(tensor.nbytes for tensor in load_file(out / "model.safetensors").values()) == 460_032


def test_full_while_saving_the_final_weights_beside_a_checkpoint_and_older_weights(person, small_disk):
    out = small_disk(1300) / "out"
    assert person.trains(output_dir=str(out), save_strategy="steps", save_steps=2, save_only_model=True).status == 0
    before = contents(out)
    said = person.trains(output_dir=str(out), overwrite_output_dir=True, max_steps=1).complaint(2)
    assert "the weights will take 0.460 MB, and only" in said
    assert contents(out) == before


def test_full_after_the_weights_are_saved(person, small_disk):
    out = small_disk(508) / "out"
    said = person.trains(output_dir=str(out)).complaint(1)
    assert f"{out}: the weights are saved, but not all files that describe them (No space left on device)" in said
    chat = person.run_file(f"model_name_or_path: {out}\ntemplate: chatml\nmax_new_tokens: 2\n")
    assert person.types("chat", chat, "--once", "hi").status == 0


@pytest.mark.parametrize("size", representatives([300, 468, 472, 480], 472))
def test_full_while_exporting(person, small_disk, size):
    disk = small_disk(size)
    path = person.run_file(f"model_name_or_path: {person.keys['model_name_or_path']}\ntemplate: chatml\n")
    said = person.types("export", path, f"export_dir={disk}/merged").complaint(1)
    assert f"{disk}/merged: it cannot be saved (" in said
    assert f"what was there before is kept and nothing half-written is left {REMEDY} folder" in said
    assert list(disk.iterdir()) == []


def test_a_folder_that_is_a_disk_of_its_own(person, small_disk):
    disk = small_disk(9000)
    path = person.run_file(f"model_name_or_path: {person.keys['model_name_or_path']}\ntemplate: chatml\n")
    assert person.types("export", path, f"export_dir={disk}").status == 0
    other = small_disk(9001)
    assert person.trains(output_dir=str(other), **{**STEPWISE, "max_steps": 1}).status == 0
    for folder in (disk, other, other / "checkpoint-1"):
        assert person.types("verify", str(folder)).status == 0


def test_files_that_may_not_grow_large(person):
    with largest_file(300_000):
        outcome = person.trains(**STEPWISE)
    assert f"cannot save to {person.out}/checkpoint-1: File too large; no checkpoint was saved before" in outcome.err
    assert f"cannot save to {person.out}: File too large; no checkpoint was saved before" in outcome.complaint(1)
    assert not list(person.out.glob("*checkpoint*"))
    with largest_file(600_000):  # enough for the weights, too little for the optimizer
        outcome = person.trains(**STEPWISE)
    assert outcome.status == 0 and f"cannot save to {person.out}/checkpoint-1: " in outcome.err
    assert not list(person.out.glob("*checkpoint*"))


def test_an_earlier_checkpoint_of_the_same_name_is_put_back(person):
    assert person.trains(**{**STEPWISE, "max_steps": 1}).status == 0
    checkpoint, before = person.out / "checkpoint-1", contents(person.out / "checkpoint-1")
    with largest_file(300_000):
        person.trains(**STEPWISE, overwrite_output_dir=True, seed=1).complaint(1)
    assert contents(checkpoint) == before
    assert (person.out / "model.safetensors").is_file()
    assert person.types("verify", str(checkpoint)).status == 0


def test_final_weights_and_an_export_that_may_not_grow_large(person):
    assert person.trains(max_steps=1).status == 0
    weights = (person.out / "model.safetensors").read_bytes()
    with largest_file(300_000):
        said = person.trains(max_steps=1, overwrite_output_dir=True, seed=1).complaint(1)
        path = person.run_file(f"model_name_or_path: {person.keys['model_name_or_path']}\ntemplate: chatml\n")
        export = person.types("export", path, f"export_dir={person.folder}/merged").complaint(1)
    assert f"cannot save to {person.out}: File too large" in said
    assert (person.out / "model.safetensors").read_bytes() == weights
    assert "it cannot be saved (File too large, it needs 0.460 MB)" in export
    assert not (person.folder / "merged").exists()


def test_a_log_that_cannot_be_written_stops_nothing(person):
    person.out.mkdir()
    (person.out / "trainer_log.jsonl").symlink_to("/dev/full")
    outcome = person.trains(resume_from_checkpoint=False)
    assert outcome.status == 0, outcome.err
