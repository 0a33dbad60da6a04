"""Arrays of JSON read in windows: any windows give what json.loads gives, in linear time and constant memory."""

import io
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import DataError
from luthier.data.sources.dataset_info import DatasetSpec, Source
from luthier.data.sources.read import read_rows
from luthier.data.sources.readers import DataFile, text
from luthier.data.sources.readers.json_rows import read_json


def spec(path, **given) -> DatasetSpec:
    return DatasetSpec(name="d", source=Source("file", str(path)), **given)


class _Counting(io.BytesIO):
    """A stream that knows how far it was read."""

    farthest = 0

    def read(self, size=-1):
        data = super().read(size)
        self.farthest = max(self.farthest, self.tell())
        return data


def read_with_windows(content: bytes, sizes):
    """The array reader with given window sizes in bytes."""

    class Stream(io.BytesIO):
        def read(self, size=-1):
            return super().read(next(sizes))

    return list(read_json(DataFile("memory", "json", lambda: Stream(content))))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


class TestWindows:
    @settings(max_examples=150, deadline=None)
    @given(
        rows=st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=6),
        seed=st.integers(0, 10**6),
        ascii_only=st.booleans(),
        indent=st.sampled_from([None, 0, 2]),
    )
    def test_any_windows_give_what_json_loads_gives(self, rows, seed, ascii_only, indent):
        try:
            content = json.dumps(rows, ensure_ascii=ascii_only, indent=indent).encode()
        except UnicodeEncodeError:
            return
        generator = random.Random(seed)
        sizes = iter(lambda: generator.choice([1, 2, 3, 7, 50]), None)
        found = read_with_windows(content, sizes)
        for row, expected in zip(found, json.loads(content), strict=True):
            if row.data is None:
                assert "surrogate" in row.reason
            else:
                assert row.data == expected

    @settings(max_examples=150, deadline=None)
    @given(
        content=st.text(alphabet='[]{},:" \n"\\aue0dn1-', max_size=40).map(lambda middle: f"[{middle}]"),
        seed=st.integers(0, 10**6),
    )
    def test_any_text_ends_in_rows_or_a_data_error(self, content, seed):
        generator = random.Random(seed)
        sizes = iter(lambda: generator.choice([1, 2, 5]), None)
        try:
            expected = json.loads(content)
        except json.JSONDecodeError:
            with pytest.raises(DataError):
                read_with_windows(content.encode(), sizes)
        else:
            assert len(read_with_windows(content.encode(), sizes)) == len(expected)

    def test_a_long_row_is_read_in_linear_time(self):
        content = json.dumps([{"a": "x" * 3_000_000}, {"a": 1}]).encode()
        sizes = iter(lambda: 1000, None)
        rows = read_with_windows(content, sizes)
        assert [len(str(row.data["a"])) for row in rows] == [3_000_000, 1]

    def test_the_first_row_costs_one_window(self):
        stream = _Counting(json.dumps([{"a": "x" * 100}] * 50_000).encode())
        rows = read_json(DataFile("memory", "json", lambda: stream))
        assert next(rows).data == {"a": "x" * 100}
        assert stream.farthest == text.FIRST_WINDOW_BYTES

    @pytest.mark.thorough
    def test_memory_does_not_follow_the_number_of_rows(self, tmp_path):
        import tracemalloc

        path = tmp_path / "big.json"
        row = json.dumps({"instruction": "q" * 50, "output": "a" * 50})
        path.write_text("[" + ",".join([row] * 150_000) + "]")  # 19 MB
        tracemalloc.start()
        count = sum(1 for _ in read_rows(spec(path), seed=0))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 150_000
        assert peak < 12 * 2**20


class TestRowsUnderAKey:
    """`{"data": [...]}` is no list of rows: the message names the key. A row that holds a list of objects is one."""

    ROWS = ({"instruction": "q", "output": "a"}, {"instruction": "r", "output": "b"})

    def read(self, folder, value, *, kind="json", indent=None, **given):
        path = folder / f"a.{kind}"
        path.write_text(value if isinstance(value, str) else json.dumps(value, indent=indent))
        return [row.data for row in read_rows(spec(path, **given), seed=0)]

    @pytest.mark.parametrize(("kind", "indent"), [("json", None), ("json", 1), ("jsonl", None)])
    @pytest.mark.parametrize(
        ("value", "keys"),
        [
            ({"data": ROWS}, "its key 'data'"),
            ({"version": 1, "tags": ["x"], "data": ROWS, "end": None}, "its key 'data'"),
            ({"train": ROWS, "test": ROWS}, "the keys 'train', 'test'"),
        ],
    )
    def test_the_key_is_named(self, tmp_path, value, keys, kind, indent):
        with pytest.raises(DataError, match=rf"under {keys}, and a file of rows is .* -> save"):
            self.read(tmp_path, value, kind=kind, indent=indent)

    def test_a_long_list_over_several_lines(self, tmp_path):
        with pytest.raises(DataError, match="under its key 'data'"):
            self.read(tmp_path, {"data": [self.ROWS[0]] * 5000}, indent=1)

    def test_a_file_with_one_row(self, tmp_path):
        row = {"conversations": [{"from": "human", "value": "x"}], "other": [{"a": 1}]}
        assert self.read(tmp_path, row, formatting="sharegpt") == [row]
        assert self.read(tmp_path, {"tags": ["x"], "data": []}) == [{"tags": ["x"], "data": []}]

    def test_a_row_among_others(self, tmp_path):
        lines = [{"data": [{"a": 1}]}, self.ROWS[0]]
        assert self.read(tmp_path, "".join(json.dumps(line) + "\n" for line in lines), kind="jsonl") == lines

    @pytest.mark.parametrize("text", ['{\n"a": tru', '{\n"a" 1}', "{\n[", '{\n"data": [{"a": 1}, {', '{\n"a": 1,\n}'])
    def test_an_object_that_is_no_json(self, tmp_path, text):
        with pytest.raises(DataError, match="the top level is an object, not a list of rows -> write"):
            self.read(tmp_path, text)
