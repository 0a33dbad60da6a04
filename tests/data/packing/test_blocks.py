"""The blocks of pt are the texts one after the other, cut every so many tokens."""

from itertools import chain

import pytest

from luthier.data.packing.blocks import Blocks
from luthier.data.rows.arrow import table_of
from luthier.data.rows.columns import SEQUENCE

TEXTS = [[1, 2, 3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13], [14, 15]]


def blocks(texts, packer):
    rows = table_of([(text, text) for text in texts], SEQUENCE)
    return [block for ids, labels in packer.join(rows) for block in ids.to_pylist() if labels is ids]


@pytest.mark.parametrize("batch_rows", [1, 2, 1000])
@pytest.mark.parametrize("size", [1, 4, 15, 16])
def test_nothing_is_lost_between_texts_or_batches(monkeypatch, size, batch_rows):
    """Only the tokens after the last whole block are left over."""
    monkeypatch.setattr("luthier.data.rows.arrow.BATCH_ROWS", batch_rows)
    found = blocks(TEXTS, Blocks(size))
    whole = list(chain.from_iterable(TEXTS))
    assert list(chain.from_iterable(found)) == whole[: len(whole) // size * size]
    assert {len(block) for block in found} <= {size}


def test_every_block_begins_with_the_begin_token():
    assert blocks(TEXTS, Blocks(4, first_token_id=0)) == [[0, 2, 3, 4], [0, 6, 7, 8], [0, 10, 11, 12]]
