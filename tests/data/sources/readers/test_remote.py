"""Datasets of hubs and clouds: what the client is asked for, streams, and remedies where they cannot be reached."""

import gzip
import json
import sys
from dataclasses import replace
from typing import ClassVar

import pytest

from luthier.config.keys.hubs import HubTokens
from luthier.core.errors import DataError, MissingExtra
from luthier.data.sources.dataset_info import Columns, DatasetSpec, Source
from luthier.data.sources.read import read_rows
from luthier.data.sources.readers.remote import first_line
from luthier.data.stream import open_stream

ROWS = [{"instruction": f"q{i}", "output": f"答{i}"} for i in range(5)]


def spec(path, **given) -> DatasetSpec:
    return DatasetSpec(name="d", source=Source("file", str(path)), **given)


def json_lines(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class TestHubs:
    def test_out_of_reach_names_the_remedy(self, tmp_path):
        description = replace(spec(tmp_path), source=Source("hf_hub", "nobody/nothing"))
        with pytest.raises(
            DataError,
            match=r"'nobody/nothing' cannot be loaded .* -> check its name, `subset` and `split`, the network",
        ):
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
        with pytest.raises(DataError, match=r"'o/r' cannot be loaded after row 2 \(the line is dead\)"):
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


class TestTablesOfHubs:
    """Rows come as tables, in which absent members are null, and undecoded."""

    ROWS = (
        {"messages": [{"role": "user", "arguments": {"city": "Oslo"}}], "source": "web"},
        {"messages": [{"role": "user", "arguments": {"amount": 1}}], "source": None},
    )
    COLUMNS = Columns(messages="messages", prompt=None, query=None, response=None)

    def read(self, monkeypatch, loaded, **given):
        import datasets

        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: loaded)
        given = {"columns": self.COLUMNS, "columns_given": True, "formatting": "openai", **given}
        return list(read_rows(DatasetSpec(name="d", source=Source("hf_hub", "o/r"), **given), seed=0))

    @pytest.mark.parametrize("streams", [False, True])
    def test_absent_members_are_left_out(self, monkeypatch, streams):
        import datasets

        loaded = datasets.Dataset.from_list(list(self.ROWS) * 200)
        rows = self.read(monkeypatch, loaded.to_iterable_dataset() if streams else loaded)
        assert [row.data for row in rows] == [{"messages": row["messages"]} for row in self.ROWS] * 200
        assert [row.number for row in rows] == list(range(1, 401))

    @pytest.mark.parametrize("streams", [False, True])
    def test_json_that_the_library_reads_as_objects_of_any_form(self, monkeypatch, streams, tmp_path):
        """It keeps members of mixed types as JSON text, with the nulls that the file has."""
        import datasets

        written = [
            {"messages": [{"role": "user", "arguments": value}]} for value in ({"a": None}, {"a": 1}, {"a": "x"})
        ]
        (tmp_path / "a.jsonl").write_text(json_lines(written))
        loaded = datasets.load_dataset(
            "json", data_files=str(tmp_path / "a.jsonl"), split="train", streaming=streams, cache_dir=str(tmp_path)
        )
        rows = [row.data for row in self.read(monkeypatch, loaded)]
        assert rows[1:] == written[1:]
        assert rows[0] in (written[0], {"messages": [{"role": "user", "arguments": {}}]})

    def test_a_column_that_is_not_read_is_not_decoded(self, monkeypatch):
        import datasets

        features = datasets.Features({"instruction": datasets.Value("string"), "photo": datasets.Image()})
        loaded = datasets.Dataset.from_dict(
            {"instruction": ["q"], "photo": [{"bytes": b"none", "path": None}]}, features
        )
        assert [row.data for row in self.read(monkeypatch, loaded, columns=Columns())] == [{"instruction": "q"}]

    def test_a_row_that_is_no_json_spoils_itself_only(self, monkeypatch):
        import datasets

        rows = [{"messages": [{"role": "user", "arguments": {"x": value}}]} for value in (b"x", None)]
        first, second = self.read(monkeypatch, datasets.Dataset.from_list(rows))
        assert first.reason == "a value of type bytes has no form in JSON: messages[0].arguments.x"
        assert second.data == {"messages": [{"role": "user", "arguments": {}}]}
        assert [row.reason for row in self.read(monkeypatch, rows)] == [first.reason, ""]

    def test_what_the_library_refuses_is_one_sentence(self, monkeypatch):
        import datasets

        def fail(*_, **__):
            raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset")

        monkeypatch.setattr(datasets, "load_dataset", fail)
        with pytest.raises(DataError, match=r"'o/r' cannot be loaded \(An error occurred while generating"):
            list(read_rows(DatasetSpec(name="d", source=Source("hf_hub", "o/r")), seed=0))


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
        words = {"strategy": "concat", "probabilities": (), "seed": 0, "buffer_size": 1, "shuffle_seed": None}
        stream = open_stream([description], **words, cache_dir=None)
        assert [row.data for _, row in stream.one_pass(0)] == ROWS[:3] == [row.data for _, row in stream.one_pass(1)]

    def test_compressed_files(self, cloud):
        cloud.pipe("/bucket/a.jsonl.gz", gzip.compress(json_lines().encode()))
        description = DatasetSpec(name="d", source=Source("cloud", "s3://bucket/a.jsonl.gz"))
        assert [row.data for row in read_rows(description, seed=0)] == ROWS

    def test_absent(self, cloud):
        description = DatasetSpec(name="d", source=Source("cloud", "s3://bucket/no.json"))
        with pytest.raises(DataError, match=r"cannot be read \(Forbidden; /bucket/no.json: no such file\) -> check"):
            list(read_rows(description, seed=0))

    @pytest.mark.parametrize(("address", "library"), [("s3://b/a.json", "s3fs"), ("gs://b/a.json", "gcsfs")])
    def test_a_missing_driver_is_one_sentence(self, address, library, monkeypatch):
        monkeypatch.setattr("luthier.core.versions.is_installed", lambda module: False)
        with pytest.raises(MissingExtra, match=f"needs the library `{library}`"):
            list(read_rows(DatasetSpec(name="d", source=Source("cloud", address)), seed=0))


def test_the_reason_of_a_failure_is_named():
    from datasets.exceptions import DatasetGenerationError

    assert first_line(
        ValueError("Config name is missing.\nPlease pick one among the available configs: ['a']\nmore")
    ) == ("Config name is missing. Please pick one among the available configs: ['a']")
    assert first_line(ValueError("\n no\nmore")) == "no" and first_line(OSError()) == "OSError"
    with pytest.raises(DatasetGenerationError) as caught:
        raise DatasetGenerationError("An error occurred") from ValueError("JSON parse error")
    assert first_line(caught.value) == "JSON parse error"
    assert first_line(DatasetGenerationError("An error occurred")) == "An error occurred"
