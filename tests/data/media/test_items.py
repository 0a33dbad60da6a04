"""The gate for media: which examples can be used, and where relative paths start."""

from dataclasses import replace

import pytest

from luthier.core.errors import MediaFault, RowError
from luthier.data.media.items import media_path, require_usable
from luthier.data.sources.dataset_info import Columns, DatasetSpec, Source
from luthier.data.types import Media

COLUMNS = Columns(images="pictures", videos="videos", audios="sounds")


@pytest.fixture
def spec(tmp_path) -> DatasetSpec:
    (tmp_path / "a.png").touch()
    return DatasetSpec(name="d", source=Source("file", "d.json"), columns=COLUMNS, media_dir=str(tmp_path))


def test_an_example_without_media_can_be_used(spec):
    require_usable(Media(), spec)


@pytest.mark.parametrize(("kind", "column"), [("images", "pictures"), ("videos", "videos"), ("audios", "sounds")])
def test_a_missing_file_is_named_with_its_column(spec, kind, column):
    with pytest.raises(MediaFault, match=rf"column '{column}' names '.*/no', which is not a file \(media_dir is /"):
        require_usable(Media(**{kind: (media_path("a.png", spec), media_path("no", spec))}), spec)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("images", "the row has images, and the model reads text only"),
        ("videos", "the row has videos or audio, and this version reads text and images only"),
        ("audios", "the row has videos or audio, and this version reads text and images only"),
    ],
)
def test_media_that_are_there_are_refused_as_such(spec, kind, reason):
    with pytest.raises(RowError, match=reason) as found:
        require_usable(Media(**{kind: (media_path("a.png", spec),)}), spec)
    assert not isinstance(found.value, MediaFault)
    require_usable(Media(images=(media_path("a.png", spec),)), spec, sees=True)


def test_an_address_is_no_file(spec):
    with pytest.raises(MediaFault, match=r"'https://example\.org/b\.png': images are read from files only"):
        require_usable(Media(images=("https://example.org/b.png",)), spec, sees=True)


def test_only_relative_paths_of_local_data_start_from_media_dir(spec, tmp_path):
    assert media_path("a.png", spec) == str(tmp_path / "a.png")
    assert media_path(str(tmp_path / "b.png"), spec) == str(tmp_path / "b.png")
    assert media_path("https://example.org/b.png", spec) == "https://example.org/b.png"
    assert media_path("a.png", replace(spec, source=Source("hf_hub", "o/r"))) == "a.png"
