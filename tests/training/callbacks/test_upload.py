"""Uploads of checkpoints: which, what of them, and what a failure costs."""

from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.training.callbacks.upload import UploadCheckpoints


@pytest.fixture
def uploads(monkeypatch):
    seen: list[dict[str, Any]] = []

    def upload(api: Any, **how: Any) -> None:
        seen.append({**how, "files": sorted(file.name for file in Path(how["folder_path"]).iterdir())})

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    return seen


def arguments(folder: Path, **changes: Any) -> Any:
    words = {"hub_token": None, "hub_revision": None, "hub_always_push": True, "hub_strategy": "every_save"}
    return SimpleNamespace(output_dir=str(folder), **{**words, **changes})


def saved(folder: Path, step: int, *, is_first: bool = True) -> Any:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    for name in ("model.safetensors", "optimizer.pt"):
        (checkpoint / name).write_text(f"{name} {step}")
    return SimpleNamespace(global_step=step, is_world_process_zero=is_first)


@pytest.mark.parametrize(
    ("strategy", "places"),
    [
        ("end", []),
        ("every_save", [None]),
        ("checkpoint", [None, "last-checkpoint"]),
        ("all_checkpoints", [None, "checkpoint-4"]),
    ],
)
def test_what_each_strategy_uploads(tmp_path, uploads, strategy, places):
    args, upload = arguments(tmp_path, hub_strategy=strategy), UploadCheckpoints("me/mine")
    upload.on_save(args, saved(tmp_path, 4), None)
    upload.on_train_end(args, None, None)
    assert [how.get("path_in_repo") for how in uploads] == places
    assert all(how["files"] == ["model.safetensors", "optimizer.pt"] for how in uploads)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"], "copies are gone"


def test_other_processes_and_checkpoints_that_could_not_be_saved_are_left_out(tmp_path, uploads):
    args, upload = arguments(tmp_path), UploadCheckpoints("me/mine")
    upload.on_save(args, saved(tmp_path, 1, is_first=False), None)
    upload.on_save(args, SimpleNamespace(global_step=2, is_world_process_zero=True), None)
    upload.on_train_end(args, None, None)
    assert not uploads


@pytest.mark.parametrize("always", [True, False])
def test_one_upload_at_a_time(tmp_path, monkeypatch, said, always):
    goes_on, names = Event(), []

    def upload(api: Any, **how: Any) -> None:
        goes_on.wait(10)
        names.append(how["commit_message"])

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    args, uploads = arguments(tmp_path, hub_always_push=always), UploadCheckpoints("me/mine")
    for step in (1, 2):
        uploads.on_save(args, saved(tmp_path, step), None)
    goes_on.set()
    uploads.on_train_end(args, None, None)
    assert names == [f"Weights of checkpoint-{step}" for step in ((1, 2) if always else (1,))]
    assert any("checkpoint-2 is left out, an earlier upload still runs" in line for line in said) is not always


def test_a_failure_is_told_and_training_goes_on(tmp_path, monkeypatch, said):
    def fail(api: Any, **how: Any) -> None:
        raise OSError("no network\nmore")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", fail)
    args, upload = arguments(tmp_path), UploadCheckpoints("me/mine")
    upload.on_save(args, saved(tmp_path, 1), None)
    upload.on_train_end(args, None, None)
    assert "warning: push_to_hub: checkpoint-1 could not be uploaded (no network); training goes on" in said
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


def test_a_file_system_without_hard_links_gets_copies(tmp_path, uploads, monkeypatch):
    def no_links(source: str, target: str) -> None:
        raise OSError("not supported")

    monkeypatch.setattr("os.link", no_links)
    args, upload = arguments(tmp_path), UploadCheckpoints("me/mine")
    upload.on_save(args, saved(tmp_path, 1), None)
    upload.on_train_end(args, None, None)
    assert uploads[0]["files"] == ["model.safetensors", "optimizer.pt"]


def test_a_copy_that_cannot_be_made_is_told_and_training_goes_on(tmp_path, uploads, monkeypatch, said):
    def full(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    for name in ("os.link", "shutil.copy2"):
        monkeypatch.setattr(name, full)
    args, upload = arguments(tmp_path), UploadCheckpoints("me/mine")
    upload.on_save(args, saved(tmp_path, 1), None)
    upload.on_train_end(args, None, None)
    assert not uploads and [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert any("checkpoint-1 could not be uploaded (" in line and "No space left" in line for line in said)
