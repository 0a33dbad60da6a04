"""Images are measured ahead of their rows, which keep their order."""

from luthier.core.errors import RowError
from luthier.data.media import reader
from luthier.data.media.ahead import measured_ahead
from tests.media_models import draw


def test_rows_keep_their_order_and_find_their_sizes(tmp_path, monkeypatch):
    paths = [str(draw(tmp_path / f"{number}.png", width=number)) for number in range(1, 60)]
    rows = [*paths, str(tmp_path / "missing.png")]
    opened = []
    monkeypatch.setattr(
        reader, "decoded_size", lambda path, size=reader.decoded_size: opened.append(path) or size(path)
    )
    found = measured_ahead(iter(rows), lambda row: [row], reader.size_of)
    for (row, (size,)), path in zip(found, rows, strict=True):
        assert row == path
        if path in paths:
            assert size == reader.size_of(path) == (28, paths.index(path) + 1)
        else:
            assert isinstance(size, RowError) and "cannot be read as an image" in str(size)
    assert sorted(opened) == sorted(rows), "each file is opened once"


def test_an_item_of_several_rows_is_measured_once():
    asked = []
    rows = [("a", "a"), ("b", "a"), (), ("b",)]

    def measure(item):
        asked.append(item)
        return item.upper()

    found = list(measured_ahead(rows, lambda row: row, measure))
    assert found == [(row, [item.upper() for item in row]) for row in rows]
    assert sorted(asked) == ["a", "b"]


def test_rows_of_small_files_share_tasks_and_keep_their_order():
    def measure(item):
        if item == "7":
            raise RowError("no image")
        return int(item)

    rows = list(map(str, range(1000)))
    found = list(measured_ahead(iter(rows), lambda row: [row] * (int(row) % 3), measure))
    assert [row for row, _ in found] == rows
    assert [sizes for row, sizes in found if row != "7"] == [[n] * (n % 3) for n in range(1000) if n != 7]
    assert [type(size) for size in found[7][1]] == [RowError]


def test_an_early_end(tmp_path):
    rows = measured_ahead(iter(range(1000)), lambda row: [], reader.size_of)
    assert next(rows) == (0, [])
    rows.close()
