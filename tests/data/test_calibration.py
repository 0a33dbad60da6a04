"""Texts for calibration: windows of the length asked for, from anywhere in the texts, the same for the same seed."""

import gzip
import json
import re

import pyarrow as pa
import pytest
from pyarrow import parquet

from luthier.core.errors import DataError
from luthier.data.calibration import read_texts, windows
from tests.tiny import byte_tokenizer

TEXTS = ["short", "a" * 40 + "b" * 40, "c" * 30, "d" * 64]


def test_windows_have_the_length_asked_for_and_lie_anywhere():
    tokenizer = byte_tokenizer()
    found = windows(TEXTS, tokenizer, num_samples=40, num_tokens=32)
    assert [len(ids) for ids in found] == [32] * 40
    whole = [tokenizer.decode(tokenizer(text).input_ids) for text in TEXTS]
    pieces = [tokenizer.decode(ids) for ids in found]
    assert all(any(piece in text for text in whole) for piece in pieces)
    assert {0, 1} == {"d" in piece for piece in pieces}  # of both texts that are long enough
    assert len({piece for piece in pieces if "d" not in piece}) > 10
    assert any(piece.startswith("ab") or re.fullmatch("a+b+", piece) for piece in pieces)
    assert found == windows(TEXTS, tokenizer, num_samples=40, num_tokens=32)
    assert found != windows(TEXTS, tokenizer, num_samples=40, num_tokens=32, seed=1)


def test_each_text_gives_one_piece_before_any_gives_two():
    texts = [chr(97 + number) * 50 for number in range(20)]
    found = windows(texts, byte_tokenizer(), num_samples=20, num_tokens=10)
    assert len({ids[-1] for ids in found}) == 20


def test_texts_that_are_all_too_short_name_the_longest():
    longest = len(byte_tokenizer()(TEXTS[1]).input_ids)
    with pytest.raises(
        DataError,
        match=f"none of its 4 texts has 1,024 tokens; the longest has {longest} -> set export_quantization_maxlen",
    ):
        windows(TEXTS, byte_tokenizer(), num_samples=2, num_tokens=1024)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "txt"])
def test_texts_are_read_from_files_of_all_kinds(tmp_path, kind):
    rows = [{"text": "one"}, {"text": "two"}]
    content = {
        "json": json.dumps(rows),
        "jsonl": "\n".join(map(json.dumps, rows)),
        "csv": "text\none\ntwo\n",
        "txt": "one\ntwo\n",
    }[kind]
    file = tmp_path / f"texts.{kind}"
    file.write_text(content, encoding="utf-8")
    assert read_texts(str(file)) == ["one", "two"]


def test_texts_of_compressed_files_and_of_tables_with_other_columns(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "one"}\n{"text": "two"}\n'))
    assert read_texts(str(tmp_path / "a.jsonl.gz")) == ["one", "two"]
    parquet.write_table(pa.table({"text": ["one", "two"], "photo": pa.array([[b"x"], None])}), tmp_path / "a.parquet")
    assert read_texts(str(tmp_path / "a.parquet")) == ["one", "two"]
    parquet.write_table(pa.table({"content": ["one"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"no row has a text in the column `text` \(its columns: content\) -> rename"):
        read_texts(str(tmp_path / "b.parquet"))


def test_a_file_that_is_not_there_and_rows_without_text(tmp_path):
    with pytest.raises(DataError, match=r"c4_demo\.jsonl: there is no such file -> correct the path"):
        read_texts(str(tmp_path / "c4_demo.jsonl"))
    file = tmp_path / "rows.json"
    file.write_text('[{"content": "x"}, {"text": ""}]', encoding="utf-8")
    with pytest.raises(DataError, match=r"no row has a text in the column `text` \(its columns: content, text\)"):
        read_texts(str(file))
