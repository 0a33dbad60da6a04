"""What stands in the way of a command is found by `luthier check`, which writes nothing and hashes no file."""

import json
from pathlib import Path

import pytest

from luthier import cli
from luthier.core.manifest import write_manifest
from tests.working_folder import RUN, write


def checkpoint(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_step": 2}', encoding="utf-8")
    (folder / "optimizer.pt").write_text("the state of an optimizer", encoding="utf-8")
    write_manifest(folder)


def test_a_checkpoint_that_is_here_must_be_whole(folder, capsys):
    checkpoint(folder / "o" / "checkpoint-2")
    checkpoint(folder / "o" / "checkpoint-4")
    run = write(folder, resume_from_checkpoint="o/checkpoint-2")
    assert cli.main(["check", run]) == 0
    assert "also holds later checkpoints (checkpoint-4)" in capsys.readouterr().out
    (folder / "o" / "checkpoint-2" / "optimizer.pt").write_text("cut", encoding="utf-8")
    assert cli.main(["check", run]) == 2
    told = "optimizer.pt: truncated, 3 of 25 bytes: the checkpoint is incomplete -> choose an earlier one"
    assert told in capsys.readouterr().err
    assert cli.main(["check", write(folder, resume_from_checkpoint="o")]) == 2
    told = "this folder contains checkpoints but is not one -> did you mean o/checkpoint-4?"
    assert told in capsys.readouterr().err


def test_a_checkpoint_that_is_passed_over_is_a_warning(folder, capsys):
    checkpoint(folder / "o" / "checkpoint-2")
    checkpoint(folder / "o" / "checkpoint-4")
    (folder / "o" / "checkpoint-4" / "optimizer.pt").unlink()
    assert cli.main(["check", write(folder)]) == 0
    assert "o/checkpoint-4 is incomplete and is not used: optimizer.pt: missing" in capsys.readouterr().out


FOLDER_OF = {"train": "output_dir", "export": "export_dir", "eval": "save_dir"}


@pytest.mark.parametrize(
    ("kind", "file", "told"),
    [
        ("train", "o/adapter_model.safetensors", "already holds weights (adapter_model.safetensors) and no checkpoint"),
        ("train", "o", "this is a file -> name a new folder"),
        ("train", "m/config.json", "this is the folder of m, which is read here -> name a new folder"),
        ("export", "o/model.safetensors", "holds weights already (model.safetensors) -> name a new folder"),
        ("export", "o", "this is a file -> name a new folder"),
        ("export", "m/config.json", "this is the folder of m, which is read here -> name a new folder"),
        ("eval", "o/summary.json", "holds finished results -> name a new folder in save_dir"),
        ("eval", "o", "this is a file -> name a new folder"),
    ],
)
def test_what_stands_where_a_command_would_write(folder, capsys, kind, file, told):
    """It is told before the command begins; what is only read is left alone."""
    key, place = FOLDER_OF[kind], "m" if file.startswith("m/") else "o"
    keys = {"train": {"output_dir": place}, "export": {}, "eval": {"task": "generation", "eval_dataset": "d"}}[kind]
    run = folder / "run.json"
    base = RUN if kind == "train" else {"model_name_or_path": "m", "template": "qwen"}
    run.write_text(json.dumps({**base, **keys, key: place}), encoding="utf-8")
    assert cli.main(["check", str(run), "--for", kind]) == 0, capsys.readouterr().err
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text("{}", encoding="utf-8")
    before = sorted(folder.rglob("*"))
    capsys.readouterr()
    assert cli.main(["check", str(run), "--for", kind]) == 2
    assert f": {key}: {place!r}: " in (said := capsys.readouterr().err) and told in said
    assert sorted(folder.rglob("*")) == before


def test_a_place_for_tokenized_rows_and_one_for_a_page(folder, capsys):
    (folder / "file").write_text("", encoding="utf-8")
    assert cli.main(["check", write(folder, tokenized_path="file")]) == 2
    assert "tokenized_path: 'file': file: this is a file -> name a new folder" in capsys.readouterr().err
    evaluation = {"task": "generation", "eval_dataset": "d", "compare": "base", "html": str(folder)}
    assert cli.main(["check", write(folder, **evaluation), "--for", "eval"]) == 2
    assert "this is a folder -> name a file in it" in capsys.readouterr().err


def test_a_folder_that_a_run_may_write_over(folder, capsys):
    (folder / "o").mkdir()
    (folder / "o" / "adapter_model.safetensors").write_text("", encoding="utf-8")
    assert cli.main(["check", write(folder, overwrite_output_dir=True)]) == 0
    assert "warning" not in capsys.readouterr().out


def test_a_place_that_cannot_be_written_may_be_on_another_machine(folder, capsys, monkeypatch):
    monkeypatch.setattr("luthier.workflow.preflight.output.os.access", lambda *asked: False)
    assert cli.main(["check", write(folder)]) == 0
    assert "output_dir: 'o': nothing can be written there" in capsys.readouterr().out
    (folder / "file").write_text("", encoding="utf-8")
    assert cli.main(["check", write(folder, output_dir="file/o")]) == 2
    assert "nothing can be written there" in capsys.readouterr().err


@pytest.mark.parametrize("keys", [{}, {"overwrite_output_dir": True}])
def test_a_run_that_must_resume_needs_a_checkpoint(folder, capsys, keys):
    run = write(folder, resume_from_checkpoint=True, **keys)
    assert cli.main(["check", run]) == 0
    told = "resume_from_checkpoint: true: o has no complete checkpoint -> leave it out to start from scratch"
    captured = capsys.readouterr()
    assert told in captured.out and captured.err == ""
    assert cli.main(["train", run]) == 2
    assert told in capsys.readouterr().err and not (folder / "o").exists()
    checkpoint(folder / "o" / "checkpoint-2")
    assert cli.main(["check", run]) == 0
    assert "warning" not in capsys.readouterr().out
    (folder / "o" / "checkpoint-2" / "optimizer.pt").write_text("cut")
    assert cli.main(["check", run]) == 2
    assert "o has no complete checkpoint (o/checkpoint-2 is incomplete and is not used" in capsys.readouterr().err
