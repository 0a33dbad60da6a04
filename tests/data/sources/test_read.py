"""Every kind of file becomes rows with their place; every kind of broken file one clear error or a reason per row."""

import json

import pytest

from luthier.core.errors import DataError, RowError
from luthier.data.sources.dataset_info import DatasetSpec, Source
from luthier.data.sources.read import column_names, data_files, read_rows
from tests.deep import DEPTHS, deep_list

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
            ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' appears twice in one object"),
            ('{"a": "\\ud83d!"}', r"holds half of a surrogate pair (\ud83d), which is not a character"),
            ('{"\\udc00": 1}', r"holds half of a surrogate pair (\udc00), which is not a character"),
            ("[1, 2]", "a row is an object, not [1, 2]"),
            ("null", "a row is an object, not null"),
            ('"text"', 'a row is an object, not "text"'),
            ("12", "a row is an object, not 12"),
            ('{"tools": [{"b": NaN}]}', "nan has no form in JSON: tools[0].b"),
            ('{"messages": {"b": [1, -Infinity]}}', "-inf has no form in JSON: messages.b[1]"),
            ('{"tools": {"b": 1e999}}', "inf has no form in JSON: tools.b"),
            ('{"tools": {"b": ' + "9" * 400 + ".0}}", "inf has no form in JSON: tools.b"),
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

    @pytest.mark.parametrize("depth", DEPTHS)
    @pytest.mark.parametrize(
        "around", ["{}", '{{"tools": {}}}', '{{"tools": [NaN, {}]}}', '{{"tools": ["\\ud800", {}]}}']
    )
    def test_a_row_that_is_nested_too_deep_is_one_reason(self, tmp_path, around, depth):
        """However far Python comes with it."""
        first, deep, last = rows_of(
            write(tmp_path, "a.jsonl", f'{{"a": 1}}\n{around.format(deep_list(depth))}\n{{"a": 2}}')
        )
        assert (first.data, last.data) == ({"a": 1}, {"a": 2})
        assert deep.data is not None or deep.reason
        whole = write(tmp_path, "a.json", f'{{"a": 1, "b": {deep_list(depth)}}}\n{{"a": 2}}')
        deep, last = rows_of(whole)
        assert last.data == {"a": 2} and (deep.data is not None or deep.reason)

    def test_a_nan_where_no_text_is_made_of_it_spoils_nothing(self, tmp_path):
        """Python writes scores so."""
        rows = data_of(write(tmp_path, "a.jsonl", '{"tools": ["NaN", 1e300], "score": NaN, "b": {"c": NaN}}'))
        assert rows[0]["tools"] == ["NaN", 1e300] and rows[0]["score"] != rows[0]["score"]

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
        "{path}: the top level is an object with the rows under its key 'data', and a file of rows is the list alone "
        "-> save that list as the file",
    ),
    (
        "a.json",
        '{\n "instruction": "q",\n "output": "a"\n}\n',
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
    ("a.json", '[{"a": 1},\n]', "{path}: line 2, column 1: there is a comma after the last row (1)"),
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
        "{path}: the file ends inside the quoted cell that begins in line 2 -> a closing quote is missing",
    ),
    ("a.csv", "a,b,a\n1,2,3\n", "{path}: the column 'a' appears twice in the header"),
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


class TestSampling:
    def test_max_samples_is_the_head(self, tmp_path):
        path = write(tmp_path, "a.json", json.dumps(ROWS))
        assert data_of(path, max_samples=2) == ROWS[:2]
        assert data_of(path, max_samples=50) == data_of(path, max_samples=10**30) == ROWS

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
