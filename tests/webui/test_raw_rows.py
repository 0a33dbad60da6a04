"""Raw rows are those of the file, in its order, also the ones that cannot be used."""

import json

import pytest

from luthier.core.errors import DataError
from luthier.webui.raw_rows import MAX_CHARS, raw_rows


def test_rows_are_shown_as_they_stand_in_their_files(tmp_path):
    rows = [{"instruction": '<img src=x onerror="alert(1)">', "output": "日本", "extra": None}, {"instruction": "b"}]
    (tmp_path / "one.json").write_text(json.dumps(rows), "utf-8")
    (tmp_path / "two.jsonl").write_text('{"instruction": "c"}\n{"instruction": \n', "utf-8")
    info = {name: {"file_name": file} for name, file in (("one", "one.json"), ("two", "two.jsonl"))}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info), "utf-8")
    shown = raw_rows(str(tmp_path), ["one", "two"], 20)
    assert [json.loads(row.text) for row in shown[:3]] == [*rows, {"instruction": "c"}]
    assert "日本" in shown[0].text and "one.json, row 1" in shown[0].place
    assert [row.is_usable for row in shown] == [True, True, True, False]
    assert "two.jsonl, row 2" in shown[3].place and "JSON" in shown[3].text
    assert raw_rows(str(tmp_path), ["one", "two"], 3) == shown[:3]
    with pytest.raises(DataError, match="not described"):
        raw_rows(str(tmp_path), ["three"], 1)


def test_a_row_of_great_length_is_cut(tmp_path):
    (tmp_path / "one.txt").write_text("x" * (2 * MAX_CHARS) + "\n", "utf-8")
    (tmp_path / "dataset_info.json").write_text('{"one": {"file_name": "one.txt"}}', "utf-8")
    (row,) = raw_rows(str(tmp_path), ["one"], 5)
    assert len(row.text) == MAX_CHARS + 2 and row.text.endswith("…")
