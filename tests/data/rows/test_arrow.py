"""Columns of lists, read a batch at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.rows.arrow import batches_of, row_lengths, table_of
from luthier.data.rows.columns import IDS, SEQUENCE


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr("luthier.data.rows.arrow.BATCH_ROWS", 4)
    monkeypatch.setattr("luthier.data.rows.arrow.BATCH_NUMBERS", 10)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("picks", ["all", "some"])
@given(lengths=st.lists(st.integers(0, 25), max_size=20), data=st.data())
def test_a_batch_ends_with_the_row_that_fills_it(picks, lengths, data):
    rows = [list(range(number)) for number in lengths]
    table = table_of([(row, row) for row in rows], SEQUENCE)
    if picks == "some" and rows:
        index = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20))
        table, rows = table.select(index), [rows[place] for place in index]
    batches = list(batches_of(table, IDS.name))
    read = [list(part) for values, sizes in batches for part in np.split(values, np.cumsum(sizes)[:-1]) if len(sizes)]
    assert read == rows and list(row_lengths(table)) == [len(row) for row in rows]
    for values, sizes in batches:
        assert 0 < len(sizes) <= 4 and len(values) - sizes[-1] < 10
    for values, sizes in batches[:-1]:
        assert len(sizes) == 4 or len(values) >= 10
