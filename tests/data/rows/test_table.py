"""Rows of an Arrow table: what `datasets.Dataset` answers to the same questions."""

import pickle

import datasets
import numpy as np
import pyarrow as pa
import pytest

from luthier.data.rows.arrow import TableWriter, batches_of, row_lengths, table_at
from luthier.data.rows.columns import SEQUENCE, WEIGHTS, Column
from luthier.data.rows.table import Table, extended, joined

ROWS = [([i] * (i % 5 + 1), [-100] * (i % 5 + 1), [0.5] * (i % 2)) for i in range(2500)]
ORDER = [2400, 3, 3, 1001, 0]
WEIGHTS_COLUMN = Column(WEIGHTS.name, WEIGHTS)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Three record batches."""
    path = tmp_path_factory.mktemp("rows") / "rows.arrow"
    with TableWriter(path, (*SEQUENCE, WEIGHTS_COLUMN)) as writer:
        for row in ROWS:
            writer.add(row)
    return path


@pytest.fixture(params=[None, ORDER], ids=["in order", "chosen"])
def both(request, file):
    ours, theirs = table_at(file), datasets.Dataset.from_file(str(file))
    return (ours, theirs) if request.param is None else (ours.select(request.param), theirs.select(request.param))


def test_rows_slices_and_columns_are_those_of_datasets(both):
    ours, theirs = both
    assert len(ours) == len(theirs) and ours.column_names == theirs.column_names
    assert list(ours) == theirs.to_list()
    assert ours[-1] == theirs[-1] and ours[np.int64(2)] == theirs[2]
    assert ours[1:4] == theirs[1:4] and ours[::2] == theirs[::2] and ours[3:1] == theirs[3:1]
    assert ours["labels"] == list(theirs["labels"])
    assert ours.__getitems__([4, 1]) == theirs.__getitems__([4, 1])
    assert ours.select_columns(["labels"])[0] == theirs.select_columns(["labels"])[0]
    assert ours.select([2, 0]).arrow().to_pylist() == theirs.select([2, 0]).to_list()
    for number in (len(ours), -len(ours) - 1):
        with pytest.raises(IndexError):
            ours[number]


def test_tables_are_joined_and_extended(both):
    ours, theirs = both
    assert list(joined([ours, ours.select([1])])) == [*theirs.to_list(), theirs[1]]
    assert list(extended(ours, [theirs[0]])) == [*theirs.to_list(), theirs[0]]


def test_long_rows_are_written_before_there_are_a_thousand(tmp_path, monkeypatch):
    monkeypatch.setattr("luthier.data.rows.arrow.BATCH_NUMBERS", 10)
    with TableWriter(tmp_path / "rows.arrow", SEQUENCE) as writer:
        for row in ([[1] * 4] * 2, [[2] * 1] * 2, [[3] * 7] * 2, [[4] * 2] * 2):
            writer.add(row)
    table = table_at(tmp_path / "rows.arrow")
    assert [batch.num_rows for batch in table.whole.to_batches()] == [2, 1, 1]
    assert table["input_ids"] == [[1] * 4, [2], [3] * 7, [4] * 2]


def test_numbers_and_lengths_come_in_batches(both):
    ours, theirs = both
    values, lengths = zip(*batches_of(ours, "input_ids"), strict=True)
    assert np.concatenate(values).tolist() == [i for row in theirs["input_ids"] for i in row]
    assert np.concatenate(lengths).tolist() == row_lengths(ours).tolist() == list(map(len, theirs["input_ids"]))
    assert {value.dtype for value in (*values, *lengths)} == {np.dtype("int32")}


def test_another_process_maps_the_file_again(both, file):
    ours, theirs = both
    for table, rows in ((ours, theirs), (joined([ours, ours]), datasets.concatenate_datasets([theirs, theirs]))):
        sent = pickle.dumps(table.select_columns(["input_ids"]))
        assert len(sent) < 20_000 + 8 * len(rows), "the rows themselves are not sent"
        assert list(pickle.loads(sent)) == rows.select_columns(["input_ids"]).to_list()


def test_rows_in_memory_are_sent_as_they_are():
    table = Table(pa.table({"input_ids": [[1, 2], [3]]}), np.array([1]))
    assert list(pickle.loads(pickle.dumps(table))) == [{"input_ids": [3]}]


def test_columns_of_other_programs_are_read_too():
    columns = {"a": pa.array([[1, None], None, [2]]), "b": pa.array([[1], [2, 3], []], pa.large_list(pa.int64()))}
    table = Table(pa.table({**columns, "c": [1, 2, 3]}))
    assert list(table.select([2, 0])) == [{"a": [2], "b": [], "c": 3}, {"a": [1, None], "b": [1], "c": 1}]
