"""What the media in the data rule out, and what tokenized rows say of themselves, is told before torch is imported."""

import json

import pytest

from luthier import cli
from tests.working_folder import write


@pytest.mark.parametrize(
    ("keys", "environment", "told"),
    [
        (
            {"sp_size": 2},
            {},
            "sp_size: 2: rows of text alone can be spread over processes, and the data declare images",
        ),
        ({"split_special_tokens": True}, {}, "would write the tokens of media as text, and the data declare images"),
        ({}, {"USE_MEGATRON_BRIDGE": "1"}, "USE_MEGATRON_BRIDGE: rows of text alone can be trained on, and the data"),
        ({"model_name_or_path": "plain"}, {}, "the model reads text only, and the data declare images"),
    ],
)
def test_what_the_media_in_the_data_rule_out(folder, capsys, monkeypatch, keys, environment, told):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (folder / "plain").mkdir()
    (folder / "plain" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "plain" / "model.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    run = write(folder, **keys)
    cli.main(["check", run])
    assert told not in "".join(capsys.readouterr())
    names = {"prompt": "instruction", "response": "output", "images": "images"}
    info = {"d": {"file_name": "d.json", "columns": names}}
    (folder / "data" / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    rows = [{"instruction": "<image>Who?", "input": "", "output": "An assistant.", "images": ["a.png"]}]
    (folder / "data" / "d.json").write_text(json.dumps(rows), encoding="utf-8")
    assert cli.main(["check", run]) == 2
    assert told in capsys.readouterr().err


def test_tokenized_rows_of_another_stage(folder, capsys):
    (folder / "rows").mkdir()
    run = write(folder, tokenized_path="rows")
    record = {"stage": "pt", "rows": {"parts": []}, "tokenizer": {}, "chat_format": {}, "keys": {}, "files": {}}
    (folder / "rows" / "made_by.json").write_text(json.dumps(record), encoding="utf-8")
    assert cli.main(["check", run]) == 2
    told = "tokenized_path: 'rows': its rows were made in another way than this run asks for: stage: pt there, sft here"
    assert told in capsys.readouterr().err
    (folder / "rows" / "made_by.json").write_text("{", encoding="utf-8")
    assert cli.main(["check", run]) == 2
    assert "made_by.json: is damaged" in capsys.readouterr().err
