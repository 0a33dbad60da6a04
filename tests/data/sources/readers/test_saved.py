"""Folders of `save_to_disk`: the rows of a Dataset, and those of a split of a DatasetDict."""

import datasets
import pytest

from luthier.core.errors import DataError
from luthier.data.sources.catalog import load_catalog
from luthier.data.sources.dataset_info import DatasetSpec, Source
from luthier.data.sources.read import read_rows

ROWS = [{"instruction": f"q{i}", "input": "", "output": f"答{i}"} for i in range(5)]


def rows_of(path, split="train"):
    spec = DatasetSpec(name="d", source=Source("file", str(path)), split=split)
    return [row.data for row in read_rows(spec, seed=0)]


@pytest.fixture
def saved():
    return datasets.Dataset.from_list(ROWS)


class TestDataset:
    def test_its_rows(self, tmp_path, saved):
        saved.save_to_disk(tmp_path / "d")
        assert rows_of(tmp_path / "d") == ROWS

    def test_several_files_in_their_order(self, tmp_path, saved):
        saved.save_to_disk(tmp_path / "d", num_shards=3)
        assert rows_of(tmp_path / "d") == ROWS

    def test_selected_rows(self, tmp_path, saved):
        saved.select([3, 1]).save_to_disk(tmp_path / "d")
        assert rows_of(tmp_path / "d") == [ROWS[3], ROWS[1]]

    def test_caches_of_the_library_are_no_rows(self, tmp_path, saved):
        saved.save_to_disk(tmp_path / "d")
        datasets.load_from_disk(tmp_path / "d").map(lambda row: {"output": "x"})
        assert list((tmp_path / "d").glob("cache-*.arrow"))
        assert rows_of(tmp_path / "d") == ROWS

    def test_a_file_that_is_gone(self, tmp_path, saved):
        saved.save_to_disk(tmp_path / "d", num_shards=2)
        (tmp_path / "d" / "data-00001-of-00002.arrow").unlink()
        with pytest.raises(
            DataError, match=r"state.json: names 'data-00001-of-00002.arrow', which is not there -> save"
        ):
            rows_of(tmp_path / "d")

    @pytest.mark.parametrize("text", ["", "[]", "{}", '{"_data_files": [1]}'])
    def test_a_state_that_is_none(self, tmp_path, saved, text):
        saved.save_to_disk(tmp_path / "d")
        (tmp_path / "d" / "state.json").write_text(text)
        with pytest.raises(DataError, match=r"state.json: (names no '_data_files'|the file is empty)"):
            rows_of(tmp_path / "d")


class TestDatasetDict:
    @pytest.fixture
    def folder(self, tmp_path, saved):
        datasets.DatasetDict({"train": saved.select(range(3)), "test": saved.select([3, 4])}).save_to_disk(
            tmp_path / "d"
        )
        return tmp_path / "d"

    def test_a_split_is_chosen_by_the_description(self, folder):
        assert rows_of(folder) == ROWS[:3]
        assert rows_of(folder, "test") == ROWS[3:]

    def test_a_split_that_it_does_not_have(self, folder):
        with pytest.raises(
            DataError, match=r"holds no split 'dev' -> give one of its splits as `split` \('train', 'test'\)"
        ):
            rows_of(folder, "dev")

    def test_a_description_may_name_a_split_of_such_a_folder_only(self, folder):
        (folder.parent / "a.json").write_text("[]")
        entries = {"d": {"file_name": "d", "split": "test"}, "a": {"file_name": "a.json", "split": "test"}}
        names = {
            name: {**entry, "file_name": str(folder.parent / entry["file_name"])} for name, entry in entries.items()
        }
        catalog = load_catalog(names)
        assert catalog.get("d").split == "test"
        with pytest.raises(DataError, match="a local file has the split 'train' only"):
            catalog.get("a")

    def test_in_a_cloud(self, folder):
        from fsspec.implementations.memory import MemoryFileSystem

        system = MemoryFileSystem()
        system.put(str(folder), "/saved", recursive=True)
        for split, rows in (("train", ROWS[:3]), ("test", ROWS[3:])):
            spec = DatasetSpec(name="d", source=Source("cloud", "memory://saved"), split=split)
            assert [row.data for row in read_rows(spec, seed=0)] == rows
        spec = DatasetSpec(name="d", source=Source("cloud", "memory://saved"), split="dev")
        with pytest.raises(DataError, match="holds no split 'dev'"):
            list(read_rows(spec, seed=0))
