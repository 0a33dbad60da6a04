"""Every type of Arrow becomes the right JSON, or a reason. Nulls that a table adds are left out, written ones stay."""

import json
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import RowError
from luthier.core.kinds import FORMATS
from luthier.data.chat.render import as_text, render
from luthier.data.sources.dataset_info import DatasetSpec, Source
from luthier.data.sources.readers.table_values import plain_row, rows_of
from luthier.data.templates import get_template

REFUSED = object()


@dataclass(frozen=True)
class Case:
    """A type, a value as `pyarrow.array` takes it, and the JSON value that it stands for, or REFUSED."""

    kind: pa.DataType
    value: Any
    json: Any


def leaf(kind, values, as_json=lambda value: value):
    return values.map(lambda value: Case(kind, value, as_json(value)))


def finite(value):
    return value if value == value and abs(value) != float("inf") else REFUSED


def refused(_):
    return REFUSED


def exact(value):
    number = int(value) if value.as_tuple().exponent >= 0 else float(value)
    return number if Decimal(repr(number)) == value else REFUSED


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
INSTANTS = st.datetimes(datetime(1900, 1, 1), datetime(2200, 1, 1))
SECONDS = st.integers(0, 86399).map(lambda n: time(n // 3600, n // 60 % 60, n % 60))
SECONDS_LONG = st.integers(0, 10**6).map(lambda n: timedelta(seconds=n))
LEAVES = [
    leaf(pa.bool_(), st.booleans()),
    *(leaf(kind(), st.integers(0, 127)) for kind in (pa.int8, pa.uint8, pa.int16, pa.uint16, pa.int32, pa.uint32)),
    leaf(pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    leaf(pa.uint64(), st.integers(0, 2**64 - 1)),
    leaf(pa.float16(), st.floats(width=16), finite),
    leaf(pa.float32(), st.floats(width=32), finite),
    leaf(pa.float64(), st.floats(), finite),
    *(leaf(kind, TEXT) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    *(leaf(kind, st.binary(max_size=4), refused) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())),
    leaf(pa.binary(3), st.binary(min_size=3, max_size=3), refused),
    *(leaf(kind, st.dates(date(1800, 1, 1)), date.isoformat) for kind in (pa.date32(), pa.date64())),
    *(leaf(kind, SECONDS, time.isoformat) for kind in (pa.time32("s"), pa.time32("ms"), pa.time64("us"))),
    leaf(pa.timestamp("us"), INSTANTS, datetime.isoformat),
    leaf(pa.timestamp("ns"), INSTANTS, datetime.isoformat),
    leaf(pa.timestamp("us", "UTC"), INSTANTS.map(lambda t: t.replace(tzinfo=UTC)), datetime.isoformat),
    *(leaf(pa.duration(unit), SECONDS_LONG, refused) for unit in ("s", "us", "ns")),
    leaf(pa.month_day_nano_interval(), st.just((1, 2, 3)), refused),
    leaf(pa.decimal128(38, 0), st.integers(-(10**38) + 1, 10**38 - 1).map(Decimal), exact),
    leaf(pa.decimal128(30, 4), st.integers(-(10**20), 10**20).map(lambda n: Decimal(n).scaleb(-4)), exact),
    leaf(pa.decimal256(70, 2), st.integers(-(10**20), 10**20).map(lambda n: Decimal(n).scaleb(-2)), exact),
    leaf(pa.dictionary(pa.int32(), pa.string()), TEXT),
]  # fmt: skip


def some(convert, items):
    """What holds a refused value is refused; nulls pass."""
    return REFUSED if any(item.json is REFUSED for item in items) else convert(items)


def nested(inner):
    """Structs, lists and maps whose members have one type each, with nulls among them."""

    @st.composite
    def struct(draw):
        cases = draw(st.lists(inner, min_size=1, max_size=3))
        absent = draw(st.lists(st.booleans(), min_size=len(cases), max_size=len(cases)))
        kind = pa.struct([(f"m{n}", case.kind) for n, case in enumerate(cases)])
        value = {
            f"m{n}": None if gone else case.value for n, (case, gone) in enumerate(zip(cases, absent, strict=True))
        }
        kept = {f"m{n}": case for n, (case, gone) in enumerate(zip(cases, absent, strict=True)) if not gone}
        return Case(kind, value, some(lambda _: {name: case.json for name, case in kept.items()}, kept.values()))

    @st.composite
    def sequence(draw):
        case, nulls = draw(inner), draw(st.integers(0, 1))
        make = draw(st.sampled_from([pa.list_, pa.large_list, pa.list_view, lambda kind: pa.list_(kind, 1 + nulls)]))
        return Case(
            make(case.kind), [case.value, *[None] * nulls], some(lambda _: [case.json, *[None] * nulls], [case])
        )

    @st.composite
    def mapping(draw):
        case, name = draw(inner), draw(TEXT)
        value, as_json = {name: case.value, f"{name}0": None}, {name: case.json, f"{name}0": None}
        return Case(pa.map_(pa.string(), case.kind), list(value.items()), some(lambda _: as_json, [case]))

    return struct() | sequence() | mapping()


CASES = st.recursive(st.one_of(LEAVES), nested, max_leaves=6)


def read(array, **options):
    return list(rows_of(pa.record_batch([array], names=["c"]), **options))


class TestEveryType:
    @settings(max_examples=400, deadline=None)
    @given(CASES)
    def test_the_value_is_its_json_or_is_refused(self, case):
        kind = pa.struct([("x", case.kind)])
        rows = read(pa.array([{"x": case.value}, {"x": None}, None], kind))
        assert rows[1:] == [{"c": {}}, {"c": None}]
        if case.json is REFUSED:
            assert isinstance(rows[0], RowError) and "column" not in str(rows[0]) and "c.x" in str(rows[0])
        else:
            assert rows[0] == {"c": {"x": case.json}}
            assert json.loads(json.dumps(rows[0], allow_nan=False)) == rows[0]

    @settings(max_examples=300, deadline=None)
    @given(
        st.sampled_from(
            [
                *(pa.timestamp(unit, zone) for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC", "Asia/Tokyo")),
                *(pa.duration(unit) for unit in ("s", "ms", "us", "ns")),
                *(pa.date64(), pa.time64("us"), pa.time64("ns"), pa.uint64(), pa.float64()),
            ]
        ),
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3),
    )
    def test_any_bits_of_a_column_are_json_or_refused(self, kind, bits):
        """Instants that Python cannot hold, nanoseconds, NaN: a row has a reason, and the others stay."""
        array = pa.array([*bits, 0], pa.int64()).view(kind)
        rows = read(pa.StructArray.from_arrays([array], ["x"]))
        assert len(rows) == len(bits) + 1
        for row in (row for row in rows if not isinstance(row, RowError)):
            json.dumps(row, allow_nan=False)
        for row in read(array):
            assert isinstance(row, RowError) or set(row) == {"c"}

    def test_unions_and_encoded_runs(self):
        union = pa.UnionArray.from_dense(
            pa.array([0, 1, 1], pa.int8()), pa.array([0, 0, 1], pa.int32()), [pa.array(["t"]), pa.array([1, None])]
        )
        rows = read(pa.StructArray.from_arrays([union], ["x"]))
        assert rows == [{"c": {"x": "t"}}, {"c": {"x": 1}}, {"c": {}}]
        runs = pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["a", None]))
        assert read(pa.StructArray.from_arrays([runs], ["x"])) == [{"c": {"x": "a"}}] * 2 + [{"c": {}}]

    def test_a_dictionary_of_structs(self):
        values = pa.array([{"a": 1, "b": None}, {"a": None, "b": "x"}])
        assert read(pa.DictionaryArray.from_arrays(pa.array([1, 0, 1]), values)) == [
            {"c": {"b": "x"}},
            {"c": {"a": 1}},
            {"c": {"b": "x"}},
        ]

    def test_extension_types(self):
        uuid = pa.array([UUID(int=1).bytes], pa.binary(16)).cast(pa.uuid())
        assert read(pa.StructArray.from_arrays([uuid], ["x"])) == [{"c": {"x": str(UUID(int=1))}}]
        flags = pa.ExtensionArray.from_storage(pa.bool8(), pa.array([1, 0], pa.int8()))
        assert read(pa.StructArray.from_arrays([flags], ["x"])) == [{"c": {"x": True}}, {"c": {"x": False}}]
        kind = pa.fixed_shape_tensor(pa.int32(), [2])
        tensor = pa.ExtensionArray.from_storage(kind, pa.array([[1, 2]], pa.list_(pa.int32(), 2)))
        (row,) = read(pa.StructArray.from_arrays([tensor], ["x"]))
        assert isinstance(row, RowError) or row == {"c": {"x": [1, 2]}}

    def test_text_that_is_not_utf8_spoils_its_row_only(self):
        offsets, bad = pa.py_buffer(pa.array([0, 1, 2], pa.int32()).buffers()[1]), pa.py_buffer(b"a\xff")
        text = pa.StringArray.from_buffers(2, offsets, bad)
        good, refusal = read(text)
        assert good == {"c": "a"}
        assert str(refusal).startswith("column 'c' holds a value that cannot be read ('utf-8' codec")
        assert isinstance(read(pa.StructArray.from_arrays([text], ["x"]))[1], RowError)

    def test_a_time_zone_that_python_does_not_know_spoils_its_rows(self):
        times = pa.array([[0], [], None], pa.list_(pa.timestamp("s", "Moon/Tycho")))
        refusal, *rest = rows_of(pa.table({"c": times}))
        assert str(refusal).startswith("column 'c' holds a value that cannot be read")
        assert rest == [{"c": []}, {"c": None}]

    @pytest.mark.parametrize(
        ("kind", "items", "reason"),
        [
            (pa.map_(pa.int64(), pa.int64()), [(1, 2)], "a key in JSON is text, not 1: c"),
            (pa.map_(pa.string(), pa.int64()), [("a", 1), ("a", 2)], "the key 'a' appears twice in one object: c"),
        ],
    )
    def test_maps_that_are_no_objects(self, kind, items, reason):
        (refusal,) = read(pa.array([items], kind))
        assert str(refusal) == reason

    def test_an_empty_map_is_an_empty_object(self):
        assert read(pa.array([[]], pa.map_(pa.string(), pa.int64()))) == [{"c": {}}]


class TestThroughAFormat:
    """What a table holds in messages, calls and tools is written as its JSON, or the row has a reason."""

    SPEC = DatasetSpec(name="d", source=Source("file", "d.parquet"), formatting="openai")

    def conversation(self, arguments, *, tool=None, content="yes"):
        function = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {"x": tool}}}
        call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
        messages = [
            {"role": "user", "content": "q", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "r", "tool_calls": None},
            {"role": "assistant", "content": content, "tool_calls": None},
        ]
        return {"messages": messages, "tools": [{"type": "function", "function": function}]}

    def learned(self, row):
        """The text of the first prompt and of the learned parts."""
        example = FORMATS.get("openai").read(row, self.SPEC)
        turns = render(get_template("qwen3"), example.messages, tools=example.tools, purpose="train")
        return as_text(turns[0].prompt), "".join(as_text(turn.answer) for turn in turns)

    def table(self, kind, value):
        """The row of a value, and one without it."""
        call = pa.struct([("name", pa.string()), ("arguments", pa.struct([("x", kind), ("y", pa.string())]))])
        message = pa.struct(
            [
                ("role", pa.string()),
                ("content", pa.string()),
                ("tool_calls", pa.list_(pa.struct([("id", pa.string()), ("type", pa.string()), ("function", call)]))),
            ]
        )
        rows = [self.conversation({"x": value}), self.conversation({"y": "z"})]
        messages = pa.array([row["messages"] for row in rows], pa.list_(message))
        tools = pa.array([row["tools"] for row in rows])
        return pa.table({"messages": messages, "tools": tools})

    @settings(max_examples=150, deadline=None)
    @given(CASES)
    def test_arguments_of_any_type(self, case):
        first, second = rows_of(self.table(case.kind, case.value), self.SPEC.column_names)
        assert '"arguments": {"y": "z"}' in self.learned(second)[1]
        if case.json is REFUSED:
            assert isinstance(first, RowError)
        else:
            text = json.dumps({"x": case.json}, ensure_ascii=False, allow_nan=False)
            assert f'"arguments": {text}' in self.learned(first)[1]

    def test_null_is_written_nowhere(self):
        rows = [self.conversation({"x": 1}, tool={"enum": ["a"]}), self.conversation({"y": 2}, tool={"type": "string"})]
        read = list(rows_of(pa.Table.from_pylist(rows), self.SPEC.column_names))
        assert "null" not in "".join(part for row in read for part in self.learned(row))
        assert '"properties": {"x": {"enum": ["a"]}}' in self.learned(read[0])[0]


class TestNulls:
    """A struct has every member that any row has. Absent is absent, and what someone wrote stays."""

    ROWS = (
        {"c": [{"role": "user", "calls": [{"arguments": {"city": "Oslo"}}, None]}]},
        {
            "c": [
                {"role": "user", "calls": [{"arguments": {"amount": 1, "options": [{"a": 1}, {"b": 2}]}}], "n": [None]}
            ]
        },
    )

    def test_members_that_a_row_does_not_have_are_left_out(self):
        assert list(rows_of(pa.Table.from_pylist(list(self.ROWS)))) == list(self.ROWS)

    def test_what_stands_in_a_schema(self):
        parameters = {"a": {"enum": [None, "x"], "type": "string"}, "b": {"type": "number"}}
        rows = [{"c": [{"parameters": {"properties": {name: schema}}}]} for name, schema in parameters.items()]
        assert list(rows_of(pa.Table.from_pylist(rows))) == rows

    def test_text_is_never_parsed(self):
        rows = [{"c": [{"arguments": '{"a": null}'}]}]
        assert list(rows_of(pa.Table.from_pylist(rows))) == rows

    def test_nulls_in_maps_and_in_json_stay(self):
        assert read(pa.array([[("a", None)]], pa.map_(pa.string(), pa.int64()))) == [{"c": {"a": None}}]
        as_json = pa.array(['{"a": null, "b": [1]}', "null", '"text"'], pa.string()).cast(pa.json_())
        assert read(as_json) == [{"c": {"a": None, "b": [1]}}, {"c": None}, {"c": "text"}]
        assert read(pa.StructArray.from_arrays([as_json], ["x"]))[0] == {"c": {"x": {"a": None, "b": [1]}}}

    @pytest.mark.parametrize(
        ("text", "reason"),
        [("{", "not JSON: "), ("[NaN]", "NaN has no form in JSON: c"), ("[" * 10**5, "not JSON: ")],
    )
    def test_json_that_is_none(self, text, reason):
        (refusal,) = read(pa.array([text], pa.string()).cast(pa.json_()))
        assert str(refusal).startswith(reason)

    def test_a_column_that_is_null_is_there(self):
        """A format tells a prompt from a dialogue by it."""
        assert read(pa.array([None, {"a": None}], pa.struct([("a", pa.string())]))) == [{"c": None}, {"c": {}}]


class TestColumns:
    def test_only_those_that_are_read_can_spoil_a_row(self):
        table = pa.table({"text": ["a"], "photo": pa.array([{"bytes": b"x"}]), "kept": pa.array([[timedelta(1)]])})
        assert list(rows_of(table, {"text", "absent"})) == [{"text": "a"}]
        assert list(rows_of(table, {"text", "photo"}, media=["photo"])) == [{"text": "a", "photo": {"bytes": b"x"}}]
        (refusal,) = rows_of(table, {"text", "kept"})
        assert str(refusal) == "a value of type timedelta has no form in JSON: kept[0]"
        assert refusal.kind == "a value of type timedelta has no form in JSON: …"

    def test_rows_without_any_of_them(self):
        assert list(rows_of(pa.table({"a": [1, 2]}), {"b"})) == [{}, {}]

    def test_a_cell_that_is_neither_list_nor_object_stays(self):
        when = datetime(2026, 1, 2, 3, 4, 5)
        assert list(rows_of(pa.table({"a": [when], "b": [b"x"]}))) == [{"a": when, "b": b"x"}]


class TestPlainRows:
    def test_a_row_that_a_client_gives(self):
        row = {"m": [{"a": None, "when": date(2026, 1, 2), "id": UUID(int=1)}], "other": [b"x"], "images": [b"y"]}
        plain = plain_row(row, {"m", "images"}, media=["images"])
        assert plain == {"m": [{"when": "2026-01-02", "id": str(UUID(int=1))}], "images": [b"y"]}
        with pytest.raises(RowError, match=r"a value of type bytes has no form in JSON: other\[0\]"):
            plain_row(row, {"other"})
