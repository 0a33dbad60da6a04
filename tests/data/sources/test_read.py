"""Every kind of file becomes rows with their place; every kind of broken file one clear error or a reason per row."""

import io
import json
import random
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.config.keys.hubs import HubTokens
from luthier.core.errors import DataError, MissingExtra, RowError
from luthier.data.sources.dataset_info import DatasetSpec, Source
from luthier.data.sources.read import column_names, data_files, read_rows
from luthier.data.sources.readers import DataFile, text
from luthier.data.sources.readers.json_rows import read_json
from luthier.data.stream import open_stream

ROWS = [{"instruction": f"q{i}", "output": f"答{i}"} for i in range(5)]


def spec(path, **given) -> DatasetSpec:
    return DatasetSpec(name="d", source=Source("file", str(path)), **given)


def rows_of(path, **options):
    return list(read_rows(spec(path), seed=0, **options))


def data_of(path, **options):
    return [row.usable() for row in rows_of(path, **options)]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def json_lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_columnar(folder, kind):
    import pyarrow as pa
    from pyarrow import feather, parquet

    table = pa.Table.from_pylist(ROWS)
    path = folder / f"rows.{'parquet' if kind == 'parquet' else 'arrow'}"
    if kind == "parquet":
        parquet.write_table(table, path)
    elif kind == "arrow file":
        feather.write_feather(table, path)
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    return path


class TestKinds:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.json", json.dumps(ROWS)),
            ("a.json", json.dumps(ROWS, indent=2, ensure_ascii=False).replace("\n", "\r\n")),
            ("a.json", b"\xef\xbb\xbf" + json.dumps(ROWS).encode()),
            ("one_object_a_line.json", json_lines()),
            ("one_row.json", json.dumps(ROWS[0])),
            ("a.jsonl", json_lines()),
            ("a.jsonl", json_lines().replace("\n", "\r\n")),
            ("a.jsonl", b"\xef\xbb\xbf" + json_lines().encode()),
            ("no_end_of_line.jsonl", json_lines().strip()),
            ("an_array.jsonl", json.dumps(ROWS)),
            ("a.csv", "instruction,output\n" + "".join(f"{r['instruction']},{r['output']}\n" for r in ROWS)),
            ("A.JSON", json.dumps(ROWS)),
        ],
    )
    def test_text_kinds(self, tmp_path, name, content):
        path = write(tmp_path, name, content)
        assert data_of(path) == (ROWS[:1] if name == "one_row.json" else ROWS)
        assert [row.number for row in rows_of(path)] == list(range(1, len(data_of(path)) + 1))

    @pytest.mark.parametrize("kind", ["parquet", "arrow stream", "arrow file"])
    def test_columnar_kinds(self, tmp_path, kind):
        path = write_columnar(tmp_path, kind)
        assert data_of(path) == ROWS
        assert column_names(data_files(spec(path))[0]) == ["instruction", "output"]

    def test_txt_has_one_row_per_line_that_is_not_blank(self, tmp_path):
        rows = rows_of(write(tmp_path, "a.txt", "one\r\n\n  two \u2028 more\n   \nthree"))
        assert [(row.number, row.line, row.data) for row in rows] == [
            (1, 1, {"text": "one"}),
            (2, 3, {"text": "  two \u2028 more"}),
            (3, 5, {"text": "three"}),
        ]

    def test_csv_cells(self, tmp_path):
        path = write(tmp_path, "a.csv", '\ufeffa,b\n"x, ""y""\nz",\n\n1,2,3\n4,5\n')
        rows = rows_of(path)
        assert [(row.number, row.line, row.data) for row in rows] == [
            (1, 2, {"a": 'x, "y"\nz', "b": None}),
            (2, 5, None),
            (3, 6, {"a": "4", "b": "5"}),
        ]
        assert rows[1].reason == "has 3 cells where the header has 2"
        assert column_names(data_files(spec(path))[0]) == ["a", "b"]

    def test_csv_cell_of_a_megabyte(self, tmp_path):
        assert len(data_of(write(tmp_path, "a.csv", "a\n" + "x" * 2**20))[0]["a"]) == 2**20

    def test_a_folder_is_read_in_order_of_names(self, tmp_path):
        write(tmp_path, "2.jsonl", json_lines(ROWS[3:]))
        write(tmp_path, "1.json", json.dumps(ROWS[:3]))
        write(tmp_path, ".hidden", "x")
        assert data_of(tmp_path) == ROWS
        assert [row.number for row in rows_of(tmp_path)] == [1, 2, 3, 1, 2]
        assert rows_of(tmp_path)[3].place == f"{tmp_path}/2.jsonl, row 1"


class TestUnusableRows:
    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' stands twice in one object"),
            ('{"a": "\\ud83d!"}', r"holds half of a surrogate pair (\ud83d), which is no character"),
            ('{"\\udc00": 1}', r"holds half of a surrogate pair (\udc00), which is no character"),
            ("[1, 2]", "a row is an object, not [1, 2]"),
            ("null", "a row is an object, not null"),
            ('"text"', 'a row is an object, not "text"'),
            ("12", "a row is an object, not 12"),
            ('{"a": ' + "9" * 5000 + "}", "a number has too many digits"),
        ],
    )
    def test_the_reason_is_given_and_reading_goes_on(self, tmp_path, row, reason):
        for name, content in (
            ("a.json", f'[{{"a": 1}}, {row}, {{"a": 2}}]'),
            ("a.jsonl", f'{{"a": 1}}\n{row}\n{{"a": 2}}'),
        ):
            rows = rows_of(write(tmp_path, name, content))
            assert [r.data for r in rows] == [{"a": 1}, None, {"a": 2}]
            assert rows[1].reason == reason
            with pytest.raises(RowError):
                rows[1].usable()

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            ('{"a": 1', "not JSON: Expecting ',' delimiter (column 8)"),
            ("{'a': 1}", "not JSON: Expecting property name enclosed in double quotes (column 2)"),
            ('{"a": 1} x', "not JSON: Extra data (column 10)"),
            ("[" * 100_000, "the JSON is nested too deep to be read"),
        ],
    )
    def test_a_bad_line_spoils_itself_only(self, tmp_path, line, reason):
        rows = rows_of(write(tmp_path, "a.jsonl", f'{{"a": 1}}\n\n{line}\n{{"a": 2}}\n'))
        assert [(r.number, r.line) for r in rows] == [(1, 1), (2, 3), (3, 4)]
        assert rows[1].reason == reason
        assert rows[1].place.endswith("a.jsonl, row 2 (line 3)")

    def test_a_whole_surrogate_pair_is_a_character(self, tmp_path):
        assert data_of(write(tmp_path, "a.json", '[{"a": "\\ud83d\\ude00"}]')) == [{"a": "😀"}]

    def test_strict_quotes_in_csv(self, tmp_path):
        rows = rows_of(write(tmp_path, "a.csv", 'a\n"x"y\nz\n'))
        assert [row.data for row in rows] == [None, {"a": "z"}]
        assert rows[0].reason == "not CSV: ',' expected after '\"'"


BROKEN_FILES = [
    ("a.json", "", "{path}: the file is empty"),
    ("a.json", " \n ", "dataset 'd': {path} holds no rows"),
    ("a.json", "[]", "dataset 'd': {path} holds no rows"),
    ("a.jsonl", "\n", "dataset 'd': {path} holds no rows"),
    ("a.csv", "a,b\n", "dataset 'd': {path} holds no rows"),
    ("a.txt", " \n\n", "dataset 'd': {path} holds no rows"),
    ("a.json", "hello", "{path}: a JSON file of rows begins with '[' (or '{{' on every line), not with 'h'"),
    (
        "a.json",
        '{\n "data": [{"a": 1}]\n}\n',
        "{path}: the top level is an object, not a list of rows -> write [ {{...}}, {{...}} ], or one object a line "
        "(the first line alone is not JSON: Expecting property name enclosed in double quotes)",
    ),
    (
        "a.json",
        '[{"a": 1},\n {"a": "tex',
        "{path}: line 2, column 2: the file ends in or before row 2, without the closing ']' -> it was cut off; "
        "write or download it again",
    ),
    (
        "a.json",
        '[{"a": 1},\n {"a": 1}',
        "{path}: line 2, column 10: the file ends in or before row 3, without the closing ']' -> it was cut off; "
        "write or download it again",
    ),
    (
        "a.json",
        "[",
        "{path}: line 1, column 2: the file ends in or before row 1, without the closing ']' -> it was cut off; "
        "write or download it again",
    ),
    ("a.json", '[{"a": 1},\n {"a": tru}]', "{path}: line 2, column 8: row 2 is not JSON: Expecting value"),
    (
        "a.json",
        '[{"a": 1}, {"a": 1} {"a": 1}]',
        "{path}: line 1, column 21: ',' or ']' is expected after row 2, not '{{'",
    ),
    ("a.json", '[{"a": 1},\n]', "{path}: line 2, column 1: a comma stands after the last row (1)"),
    ("a.json", '[{"a": 1}] [', "{path}: line 1, column 12: text after the end of the list of rows"),
    ("a.json", "[" * 100_000, "{path}: line 1, column 2: row 1 is nested too deep to be read"),
    (
        "a.json",
        b'[{"a": "caf\xe9"}]',
        "{path}: not UTF-8 (byte 0xe9 at position 11) -> convert the file, for example with `iconv -t UTF-8`",
    ),
    (
        "a.jsonl",
        b'\xef\xbb\xbf{"a": 1}\n{"a": "\xff"}',
        "{path}: not UTF-8 (byte 0xff at position 19) -> convert the file, for example with `iconv -t UTF-8`",
    ),
    (
        "a.csv",
        b"a\n1\n\xe4",
        "{path}: not UTF-8 (byte 0xe4 at position 4) -> convert the file, for example with `iconv -t UTF-8`",
    ),
    ("a.txt", "hi".encode("utf-16"), "{path}: the file is UTF-16, not UTF-8 -> save it as UTF-8"),
    (
        "a.csv",
        'a,b\n1,"x\n2,3\n',
        "{path}: the file ends within the quoted cell that begins in line 2 -> a closing quote is missing",
    ),
    ("a.csv", "a,b,a\n1,2,3\n", "{path}: the column 'a' stands twice in the header"),
    (
        "a.xlsx",
        "x",
        "dataset 'd': {path}: unknown kind of file 'xlsx' (one of json, jsonl, csv, parquet, arrow, txt)",
    ),
]


class TestBrokenFiles:
    @pytest.mark.parametrize(("name", "content", "message"), BROKEN_FILES)
    def test_one_clear_error(self, tmp_path, name, content, message):
        path = write(tmp_path, name, content)
        with pytest.raises(DataError) as caught:
            rows_of(path)
        assert str(caught.value) == message.format(path=path)

    @pytest.mark.parametrize("kind", ["parquet", "arrow"])
    def test_columnar(self, tmp_path, kind):
        with pytest.raises(DataError, match=f"not a readable {kind} file"):
            rows_of(write(tmp_path, f"a.{kind}", "no such thing"))

    @pytest.mark.parametrize("kind", ["parquet", "arrow stream"])
    def test_columnar_cut_off(self, tmp_path, kind):
        path = write_columnar(tmp_path, kind)
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(DataError, match="not a readable"):
            rows_of(path)

    def test_rows_before_the_break_come_first(self, tmp_path):
        rows = read_rows(spec(write(tmp_path, "a.json", '[{"a": 1}, {"a": 2}, {"a"')), seed=0)
        assert [next(rows).data, next(rows).data] == [{"a": 1}, {"a": 2}]
        with pytest.raises(DataError, match="in or before row 3"):
            next(rows)

    def test_absent_file_names_the_nearest(self, tmp_path):
        write(tmp_path, "identity.json", "[]")
        with pytest.raises(DataError, match=r"identiti.json: no such file -> did you mean 'identity.json'\?"):
            rows_of(tmp_path / "identiti.json")
        with pytest.raises(DataError, match="no such file -> correct `file_name`"):
            rows_of(tmp_path / "zzz")
        with pytest.raises(DataError, match="there is no folder"):
            rows_of(tmp_path / "nowhere" / "a.json")

    def test_folders(self, tmp_path):
        with pytest.raises(DataError, match="is empty"):
            rows_of(tmp_path)
        write(tmp_path, "a.json", json.dumps(ROWS))
        write(tmp_path, "b.csv", "a\n1\n")
        with pytest.raises(DataError, match=r"several kinds \(csv, json\)"):
            rows_of(tmp_path)
        (tmp_path / "b.csv").unlink()
        (tmp_path / "sub").mkdir()
        with pytest.raises(DataError, match="holds a folder, 'sub'"):
            rows_of(tmp_path)

    def test_unreadable_file(self, tmp_path, monkeypatch):
        path = write(tmp_path, "a.json", "[]")

        def refuse(*_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("builtins.open", refuse)
        with pytest.raises(DataError, match="cannot be read: Permission denied"):
            rows_of(path)


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
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
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


class TestSampling:
    def test_max_samples_is_the_head(self, tmp_path):
        path = write(tmp_path, "a.json", json.dumps(ROWS))
        assert data_of(path, max_samples=2) == ROWS[:2]
        assert data_of(path, max_samples=50) == ROWS

    def test_num_samples_draws_without_replacement(self, tmp_path):
        path = write(tmp_path, "a.jsonl", json_lines())

        def sample(num_samples, seed, max_samples=None):
            rows = read_rows(spec(path, num_samples=num_samples), seed=seed, max_samples=max_samples)
            return [row.number for row in rows]

        assert sorted(sample(5, 1)) == [1, 2, 3, 4, 5]
        assert len(set(sample(3, 1))) == 3
        assert sample(3, 1) == sample(3, 1) != sample(3, 2)
        assert sample(4, 1, max_samples=2) == sample(4, 1)[:2]

    def test_only_the_excess_is_drawn_again(self, tmp_path):
        path = write(tmp_path, "a.jsonl", json_lines())
        numbers = [row.number for row in read_rows(spec(path, num_samples=8), seed=1)]
        assert sorted(numbers[:5]) == [1, 2, 3, 4, 5]
        assert len(numbers) == 8


class TestHubs:
    def test_out_of_reach_names_the_remedy(self, tmp_path):
        description = replace(spec(tmp_path), source=Source("hf_hub", "nobody/nothing"))
        with pytest.raises(DataError, match=r"'nobody/nothing' cannot be loaded .* -> check the name, the network"):
            list(read_rows(description, seed=0, cache_dir=str(tmp_path)))

    def test_what_the_client_is_asked(self, monkeypatch):
        import datasets

        asked = {}

        def load_dataset(path, name, **words):
            asked.update(words, path=path, name=name)
            return ROWS

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        description = DatasetSpec(name="d", source=Source("hf_hub", "o/r"), subset="s", split="test", folder="f")
        rows = list(
            read_rows(description, seed=0, cache_dir="c", tokens=HubTokens(hf_hub="t", ms_hub="m"), max_samples=3)
        )
        assert [row.data for row in rows] == ROWS[:3]
        assert rows[0].place == "o/r, row 1"
        assert asked == {
            "path": "o/r", "name": "s", "data_dir": "f", "split": "test", "cache_dir": "c", "token": "t",
        }  # fmt: skip

    @pytest.mark.parametrize(
        ("kind", "word"), [("hf_hub", "streaming"), ("ms_hub", "use_streaming"), ("om_hub", "streaming")]
    )
    def test_a_stream_is_fetched_as_it_is_read(self, kind, word, monkeypatch):
        """Of an endless repository the first rows are there at once; a connection that breaks off names the place."""
        from types import SimpleNamespace

        import datasets

        def load(*_, **words):
            assert words[word] is True

            def rows():
                yield from ROWS[:2]
                raise ConnectionError("the line is dead")

            return rows()

        client = SimpleNamespace(MsDataset=type("MsDataset", (), {"load": load}))
        client.OmDataset = SimpleNamespace(load_dataset=load)
        monkeypatch.setattr(datasets, "load_dataset", load)
        monkeypatch.setattr("luthier.data.sources.readers.remote.require", lambda *_: client)
        rows = read_rows(DatasetSpec(name="d", source=Source(kind, "o/r")), seed=0, streams=True)
        assert [next(rows).data, next(rows).data] == ROWS[:2]
        with pytest.raises(DataError, match=r"'o/r' cannot be loaded behind row 2 \(the line is dead\)"):
            next(rows)

    @pytest.mark.parametrize(("kind", "library"), [("ms_hub", "modelscope"), ("om_hub", "openmind")])
    def test_a_missing_client_is_one_sentence(self, kind, library, monkeypatch):
        monkeypatch.setitem(sys.modules, library, None)
        monkeypatch.setattr("luthier.core.versions.is_installed", lambda module: False)
        with pytest.raises(MissingExtra, match=f"needs the library `{library}`"):
            list(read_rows(DatasetSpec(name="d", source=Source(kind, "o/r")), seed=0))

    def test_modelscope_sets_are_unwrapped(self, monkeypatch):
        from types import SimpleNamespace

        class MsDataset:
            @staticmethod
            def load(name, subset_name, data_dir, split, cache_dir, token):
                return MsDataset()

            def to_hf_dataset(self):
                return ROWS

        monkeypatch.setattr(
            "luthier.data.sources.readers.remote.require", lambda *_: SimpleNamespace(MsDataset=MsDataset)
        )
        rows = read_rows(DatasetSpec(name="d", source=Source("ms_hub", "o/r")), seed=0)
        assert [row.data for row in rows] == ROWS


class TestClouds:
    @pytest.fixture
    def cloud(self, monkeypatch):
        """An s3 stand-in: fsspec's memory file system that refuses to be read without credentials."""
        from fsspec.implementations.memory import MemoryFileSystem
        from fsspec.registry import _registry

        import luthier.data.sources.readers.remote as remote

        class Private(MemoryFileSystem):
            protocol = "s3"
            store: ClassVar[dict] = {}
            pseudo_dirs: ClassVar[list] = [""]
            cachable = False

            def __init__(self, anon=False, **storage):
                super().__init__(**storage)
                self.anon = anon

            @classmethod
            def _strip_protocol(cls, path):
                return MemoryFileSystem._strip_protocol(path.removeprefix("s3://"))

            def exists(self, path, **_):
                if self.anon:
                    raise PermissionError("Forbidden")
                return super().exists(path)

        monkeypatch.setitem(_registry, "s3", Private)
        driver = replace(remote._S3, errors="builtins", error="LookupError")
        monkeypatch.setitem(remote._DRIVERS, "s3", driver)
        monkeypatch.setattr(remote, "require", lambda *_: None)
        return Private()

    def test_credentials_are_used_when_anonymous_access_is_refused(self, cloud):
        cloud.pipe("/bucket/b.jsonl", json_lines(ROWS[3:]).encode())
        cloud.pipe("/bucket/a.json", json.dumps(ROWS[:3]).encode())
        for address, expected in (("s3://bucket/a.json", ROWS[:3]), ("s3://bucket", ROWS)):
            description = DatasetSpec(name="d", source=Source("cloud", address))
            assert [row.data for row in read_rows(description, seed=0)] == expected

    def test_a_stream_of_cloud_files(self, cloud):
        cloud.pipe("/bucket/a.json", json.dumps(ROWS[:3]).encode())
        description = DatasetSpec(name="d", source=Source("cloud", "s3://bucket/a.json"))
        words = {"strategy": "concat", "probabilities": (), "seed": 0, "buffer_size": 1}
        stream = open_stream([description], **words, cache_dir=None)
        assert [row.data for _, row in stream.one_pass(0)] == ROWS[:3] == [row.data for _, row in stream.one_pass(1)]

    def test_absent(self, cloud):
        description = DatasetSpec(name="d", source=Source("cloud", "s3://bucket/no.json"))
        with pytest.raises(DataError, match=r"cannot be read \(Forbidden; /bucket/no.json: no such file\) -> check"):
            list(read_rows(description, seed=0))

    @pytest.mark.parametrize(("address", "library"), [("s3://b/a.json", "s3fs"), ("gs://b/a.json", "gcsfs")])
    def test_a_missing_driver_is_one_sentence(self, address, library, monkeypatch):
        monkeypatch.setattr("luthier.core.versions.is_installed", lambda module: False)
        with pytest.raises(MissingExtra, match=f"needs the library `{library}`"):
            list(read_rows(DatasetSpec(name="d", source=Source("cloud", address)), seed=0))
