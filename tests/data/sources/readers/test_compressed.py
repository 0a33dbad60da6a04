"""Compressed text gives the rows of the text; a broken file is one sentence."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pytest

from luthier.core.errors import DataError
from luthier.data.sources.dataset_info import DatasetSpec, Source
from luthier.data.sources.read import column_names, data_files, read_rows
from luthier.data.sources.readers.compressed import COMPRESSIONS, split_extensions

ROWS = [{"instruction": f"q{i}", "output": f"答{i}"} for i in range(5)]
WRITE = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True),
}
TEXTS = {
    "json": json.dumps(ROWS),
    "jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
    "csv": "instruction,output\n" + "".join(f"{row['instruction']},{row['output']}\n" for row in ROWS),
}


def spec(path):
    return DatasetSpec(name="d", source=Source("file", str(path)))


def rows_of(path):
    return [row.data for row in read_rows(spec(path), seed=0)]


def write(folder, name, text):
    path = folder / name
    path.write_bytes(WRITE[name.rpartition(".")[2]](text.encode()))
    return path


@pytest.mark.parametrize("compression", COMPRESSIONS)
class TestEveryCompression:
    @pytest.mark.parametrize("kind", TEXTS)
    def test_the_rows_are_those_of_the_text(self, tmp_path, kind, compression):
        path = write(tmp_path, f"a.{kind}.{compression}", TEXTS[kind])
        assert rows_of(path) == ROWS
        (file,) = data_files(spec(path))
        assert file.kind == kind and column_names(file) == (["instruction", "output"] if kind == "csv" else None)

    def test_lines_of_text(self, tmp_path, compression):
        assert rows_of(write(tmp_path, f"A.TXT.{compression}", "a\n\nb")) == [{"text": "a"}, {"text": "b"}]

    def test_more_than_one_window(self, tmp_path, compression):
        lines = [{"instruction": "x" * 1000, "output": str(n)} for n in range(3000)]
        path = write(tmp_path, f"a.jsonl.{compression}", "".join(json.dumps(row) + "\n" for row in lines))
        assert rows_of(path) == lines

    def test_streams_one_after_the_other(self, tmp_path, compression):
        path = tmp_path / f"a.jsonl.{compression}"
        path.write_bytes(
            b"".join(WRITE[compression](line.encode()) for line in TEXTS["jsonl"].splitlines(keepends=True))
        )
        assert rows_of(path) == ROWS

    @pytest.mark.parametrize("cut", [1, 20])
    def test_a_file_that_was_cut_off(self, tmp_path, compression, cut):
        path = write(tmp_path, f"a.jsonl.{compression}", TEXTS["jsonl"])
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(DataError, match=rf"a.jsonl.{compression}: not a readable {compression} file .*cut off"):
            rows_of(path)

    def test_a_file_that_is_not_compressed(self, tmp_path, compression):
        path = tmp_path / f"a.jsonl.{compression}"
        path.write_text(TEXTS["jsonl"])
        with pytest.raises(DataError, match=f"not a readable {compression} file"):
            rows_of(path)

    def test_nothing_compressed_has_no_rows(self, tmp_path, compression):
        with pytest.raises(DataError, match="holds no rows"):
            rows_of(write(tmp_path, f"a.jsonl.{compression}", ""))


def test_a_folder_of_compressed_and_plain_files(tmp_path):
    (tmp_path / "1.json").write_text(json.dumps(ROWS[:2]))
    write(tmp_path, "2.jsonl.gz", "".join(json.dumps(row) + "\n" for row in ROWS[2:4]))
    write(tmp_path, "3.json.zst", json.dumps(ROWS[4:]))
    assert rows_of(tmp_path) == ROWS


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a.json", ("json", "")),
        ("A.JSONL.GZ", ("jsonl", "gz")),
        ("b.c/a.v2.csv.xz", ("csv", "xz")),
        ("a.parquet.gz", ("parquet.gz", "")),
        ("a.tar.gz", ("tar.gz", "")),
        ("data/a.gz", ("gz", "")),
        (".gz", ("", "")),
        ("b.json/a", ("", "")),
        ("a", ("", "")),
    ],
)
def test_kind_and_compression_of_a_name(name, parts):
    assert split_extensions(name) == parts


@pytest.mark.parametrize("name", ["a.parquet.gz", "a.tar.gz", "a.gz", "a.zip"])
def test_what_must_be_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"unknown kind of file .* -> unpack it; of compressed files only json, jsonl"):
        rows_of(tmp_path / name)
