"""Uploads: what goes, and what a failure says."""

from pathlib import Path

import pytest

from luthier.core.errors import RunFailed
from luthier.training.hub import creating_repository, upload_result


@pytest.fixture
def sent(monkeypatch) -> list[dict]:
    seen: list[dict] = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.upload_folder", lambda api, **how: seen.append({"token": api.token, **how})
    )
    return seen


def test_the_folder_goes_without_checkpoints_and_drafts(tmp_path, sent):
    from huggingface_hub.utils import filter_repo_objects

    upload_result(tmp_path, "me/mine", "secret", "main")
    (how,) = sent
    assert (how["repo_id"], how["folder_path"], how["token"], how["revision"]) == (
        "me/mine",
        tmp_path,
        "secret",
        "main",
    )
    names = ["model.safetensors", "manifest.json", "checkpoint-3/optimizer.pt", ".77.tmp/a", ".checkpoint-3.earlier/a"]
    names += ["heartbeat.json", "heartbeat_1.json"]
    assert list(filter_repo_objects(names, ignore_patterns=how["ignore_patterns"])) == names[:2]


def test_failures_say_what_is_kept(tmp_path):
    """Tests are offline."""
    with pytest.raises(RunFailed, match=rf"me/mine: the upload failed \(.*\); the result is whole, in {tmp_path} ->"):
        upload_result(Path(tmp_path), "me/mine", None, None)
    with (
        pytest.raises(RunFailed, match=r"the repository cannot be created \(no\) -> check hub_model_id"),
        creating_repository(),
    ):
        raise OSError("no\nmore")
