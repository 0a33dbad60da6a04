"""The kind of a column is told by its name, so that a row that was read back is what was written."""

import pyarrow as pa
import pytest

from luthier.core.kinds import STAGES
from luthier.data.packing.best_fit import Packs
from luthier.data.packing.blocks import Blocks
from luthier.data.packing.kl_pairs import MismatchedPairs
from luthier.data.rows.arrow import table_of
from luthier.data.rows.columns import IMAGES, KINDS, kind_of, numbers_of, part_of, parts_of, with_media

PACKERS = (Packs(8), Blocks(8), MismatchedPairs(8))
TABLES = [STAGES.get(name).rows.columns for name in STAGES.names] + [packer.columns for packer in PACKERS]


@pytest.mark.parametrize("columns", TABLES, ids=lambda columns: " ".join(column.name for column in columns))
def test_a_table_keeps_kinds_and_types(columns):
    row = [[0.5] if column.kind.dtype == "float32" else [7] for column in columns]
    table = table_of([row], columns)
    assert table.column_names == [column.name for column in columns]
    for column, values in zip(columns, row, strict=True):
        assert kind_of(column.name) is column.kind
        assert table.whole.schema.field(column.name).type.value_type == getattr(pa, column.kind.dtype)()
        assert table[0][column.name] == values


@pytest.mark.parametrize("columns", TABLES, ids=lambda columns: " ".join(column.name for column in columns))
def test_a_row_is_its_parts_and_its_numbers(columns):
    row = {column.name: [order] for order, column in enumerate(columns)}
    parts = {f"{part}{name}" for part in parts_of(row) for name in part_of(row, part)}
    assert parts.isdisjoint(numbers_of(row))
    assert parts | set(numbers_of(row)) == set(row)


def test_no_name_of_a_kind_ends_in_another():
    names = [kind.name for kind in KINDS]
    assert not [(a, b) for a in names for b in names if a != b and a.endswith(b)]


@pytest.mark.parametrize("columns", TABLES, ids=lambda columns: " ".join(column.name for column in columns))
def test_columns_of_images(columns):
    """Each part has blocks, the row has the images, and neither is a number of the row."""
    seen = with_media(columns)
    names = [column.name for column in seen]
    parts = parts_of(names)
    assert names[len(columns) :] == [*(f"{part}blocks" for part in parts), "images"]
    table = table_of([[["a.png"] if column.kind is IMAGES else [7] for column in seen]], seen)
    assert all(kind_of(column.name) is column.kind for column in seen)
    assert numbers_of(names) == numbers_of(column.name for column in columns)
    assert table[0]["images"] == ["a.png"]
    assert part_of(table[0], parts[0])["blocks"] == [7]
