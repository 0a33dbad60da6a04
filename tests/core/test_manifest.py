"""A manifest names every file but itself and the checkpoints, and notices what was done to them."""

import json
from pathlib import Path

import pytest

from luthier.core.errors import OutputError
from luthier.core.manifest import read_manifest, verify_folder, write_manifest


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"0123456789")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "中文.txt").write_text("hello", encoding="utf-8")
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "optimizer.pt").write_bytes(b"x")
    write_manifest(tmp_path, seed=42, data_fingerprint="abc")
    return tmp_path


def test_it_holds_sizes_digests_versions_and_facts(folder):
    manifest = read_manifest(folder)
    assert manifest["seed"] == 42
    assert manifest["data_fingerprint"] == "abc"
    assert manifest["versions"].keys() >= {"python", "luthier", "torch", "transformers", "peft"}
    assert manifest["files"]["model.safetensors"] == {
        "size_bytes": 10,
        "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",  # `printf 0123456789 | sha256sum`
    }
    assert set(manifest["files"]) == {"model.safetensors", "notes/中文.txt"}


def test_an_untouched_folder_verifies(folder):
    assert verify_folder(folder) == []


def test_writing_again_describes_the_folder_as_it_is_now(folder):
    (folder / "model.safetensors").write_bytes(b"new")
    write_manifest(folder)
    assert verify_folder(folder) == []
    assert sorted(file.name for file in folder.iterdir() if file.name.startswith("manifest")) == ["manifest.json"]


@pytest.mark.parametrize(
    ("content", "finding"),
    [
        (None, "model.safetensors: missing"),
        (b"01234", "model.safetensors: truncated, 5 of 10 bytes"),
        (b"0123456789a", "model.safetensors: changed, 11 bytes instead of 10"),
        (b"0123456780", "model.safetensors: changed, same size but another sha256"),
    ],
)
def test_what_was_done_to_a_file_is_named(folder, content, finding):
    (folder / "model.safetensors").unlink()
    if content is not None:
        (folder / "model.safetensors").write_bytes(content)
    assert verify_folder(folder) == [finding]


def test_more_files_and_other_checkpoints_are_no_fault(folder):
    (folder / "checkpoint-10" / "optimizer.pt").unlink()
    (folder / "README").write_text("mine")
    assert verify_folder(folder) == []


@pytest.mark.parametrize(
    "text", ["", "{", "[]", json.dumps({"format": 1}), '{"files": {"a": 1}}', '{"files": {"a": {"size_bytes": "1"}}}']
)
def test_a_damaged_manifest_is_an_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(OutputError, match="is not a manifest"):
        verify_folder(tmp_path)


def test_no_folder_and_no_manifest_are_errors(tmp_path):
    with pytest.raises(OutputError, match="holds no manifest"):
        verify_folder(tmp_path)
    with pytest.raises(OutputError, match="no such folder"):
        verify_folder(tmp_path / "absent")
